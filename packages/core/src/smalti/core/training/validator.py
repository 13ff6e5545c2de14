"""A look at held-out images in the midst of a tokenizer's training: metrics, pictures, and the best weights so far.

Every process looks at whole batches of neighbouring images; what it finds is joined in the order of images, so that
numbers do not depend on how many processes there are.

Legend: N images, C channels, H W pixels, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from smalti.core import distributed
from smalti.core.autoencoder import Autoencoder
from smalti.core.contracts import Features, Tokenizer
from smalti.core.data.dataset import ImageDataset
from smalti.core.data.images import enlargement, grid, png_bytes, to_uint8
from smalti.core.data.loader import Batch, IndexedBatch, read_images
from smalti.core.errors import UserError
from smalti.core.files import write_bytes, write_json
from smalti.core.frechet import frechet_distance_of_rows
from smalti.core.metrics import pair_metrics, values_of
from smalti.core.plugins import registry
from smalti.core.progress import Reporter
from smalti.core.run_folder import RunFolder
from smalti.core.training.options import Validation
from smalti.core.training.sharding import whole
from smalti.core.training.text import TextFeatures
from smalti.core.training.trackers import Trackers

PICTURES = "images"
PAIRS_OF_A_ROW = 4


class Findings(NamedTuple):
    """Of some images: values by metric; features of them and of their reconstructions; pairs to be shown, uint8."""

    values: dict[str, list[float]]
    real: list[Tensor]
    made: list[Tensor]
    pairs: list[Tensor]


class Validator:
    """Reconstructs the same images every time, on all processes together.

    Args:
        options: what to measure, and when.
        tokenizer: in training, or an autoencoder.
        dataset: of the held-out images.
        run: takes pictures and the best weights.
        stage: names the pictures.
        reporter: told about images that cannot be decoded.
        max_undecodable: of those, that may be left out.
        text: makes features of the images' texts, which the decoder reads.

    Raises:
        UserError: a metric that is not installed, or the best of something that is not measured.
    """

    def __init__(
        self,
        options: Validation,
        tokenizer: Tokenizer | Autoencoder,
        dataset: ImageDataset,
        *,
        run: RunFolder,
        stage: str,
        reporter: Reporter,
        max_undecodable: int,
        text: TextFeatures | None = None,
    ) -> None:
        self.options, self.tokenizer, self.text = options, tokenizer, text
        self.dataset, self.max_undecodable = dataset, max_undecodable
        self.run, self.stage, self.reporter = run, stage, reporter
        self.metrics = pair_metrics(options.metrics)
        self.features = options.features.build().eval() if options.features is not None else None
        measured = [*self.metrics, *(["rfid"] if self.features is not None else [])]
        if options.best is not None and options.best.metric not in measured:
            raise UserError(
                f"train.{tokenizer.kind}.validation.best: {options.best.metric!r} is not measured, "
                f"only {', '.join(measured) or 'nothing'} is{_advice(options.best.metric)}"
            )
        self.best: float | None = None
        self._images: list[tuple[Tensor, dict[str, Tensor]]] = []

    def is_due(self, step: int) -> bool:
        """Whether it is time after so many updates."""
        return step % self.options.every == 0

    def __call__(
        self, step: int, averaged: Mapping[str, Tensor] | None, trackers: Trackers | None
    ) -> dict[str, dict[str, float]]:
        """Measure, show, and keep the weights if they are the best; leaves the tokenizer in evaluation mode.

        To be called by all processes.

        Args:
            step: updates so far.
            averaged: weights that are measured as well.
            trackers: shown the pictures.

        Returns:
            Means over the images by metric, under `weights`, and under `ema` for averaged ones; without metrics for
            which the images are too small.

        Raises:
            UserError: there is no image, or images are too small for the metric that tells the best weights.
        """
        if not self._images:
            self._images = [*self._read()]
        self.tokenizer.eval()
        found: dict[str, dict[str, float]] = {}
        found["weights"], pairs = self._measured()
        if averaged is not None:
            with replaced(self.tokenizer, averaged):
                found["ema"], pairs = self._measured()
        if pairs and distributed.rank() == 0:
            self._show(torch.stack(pairs), step, trackers)
        self._keep_best(step, found, averaged)
        return found

    def state_dict(self) -> dict[str, Any]:
        """What it remembers."""
        return {"best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.best = state["best"]

    def _read(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        device = next(self.tokenizer.parameters()).device
        if self.features is not None:
            self.features.to(device)
        size, images = self.options.batch_size, min(self.options.images, len(self.dataset))
        batches, rank, processes = -(-images // size), distributed.rank(), distributed.world_size()
        # Neighbouring batches, whole ones: each holds the same images on any number of processes.
        start, stop = (min(share * batches // processes * size, images) for share in (rank, rank + 1))
        for batch in read_images(
            self.dataset,
            self.tokenizer.preprocessing,
            size,
            start,
            stop,
            max_undecodable=self.max_undecodable,
            warn=self.reporter.say,
        ):
            images_there = batch.images.to(device)
            yield images_there, self._context(batch._replace(images=images_there))

    def _measured(self) -> tuple[dict[str, float], list[Tensor]]:
        """Means over all images, and the pairs that are shown, on every process."""
        parts = distributed.gather_objects(self._own_findings())
        values = {name: [value for part in parts for value in part.values[name]] for name in self.metrics}
        found = {name: fmean(numbers) for name, numbers in values.items() if numbers}
        if self.features is not None:
            real, made = (torch.cat([*chain(*sets)]) for sets in ([p.real for p in parts], [p.made for p in parts]))
            found["rfid"] = frechet_distance_of_rows(real, made)
        return found, [pair for part in parts for pair in part.pairs][: self.options.pictures]

    @torch.no_grad()
    def _own_findings(self) -> Findings:
        own = Findings({name: [] for name in self.metrics}, [], [], [])
        channels = self.tokenizer.preprocessing.channels
        most = max(distributed.gather_objects(len(self._images)))
        if not most:
            raise UserError(f"there is no image in {self.dataset.name}, the recipe's data.validation")
        for images, context in self._images:
            originals, copies = to_uint8(images), to_uint8(self._reconstructed(images, context))
            planes = [pixels[..., :channels].movedim(-1, 1) for pixels in (copies, originals)]
            for name, metric in self.metrics.items():
                own.values[name].extend(values_of(metric, planes[0], planes[1]) or ())
            if self.features is not None:
                own.real.append(_pooled(self.features, originals))
                own.made.append(_pooled(self.features, copies))
            wanted = self.options.pictures - len(own.pairs)
            own.pairs.extend(torch.stack([originals, copies], 1).cpu()[:wanted])
        # Where weights are sharded, the processes gather them together, each as often as the others.
        for _ in range(most - len(self._images)):
            blank = self._blank()
            self._reconstructed(blank.images, self._context(blank))
        return own

    def _reconstructed(self, images: Tensor, context: dict[str, Tensor]) -> Tensor:
        decode: Callable[..., Tensor] = self.tokenizer.decode
        return decode(self.tokenizer.encode(images), **context)

    def _context(self, batch: Batch | IndexedBatch) -> dict[str, Tensor]:
        """What the decoder reads beside the latent."""
        return {} if self.text is None else {"text": self.text.to(batch.images.device)(batch, self.dataset.classes)}

    def _blank(self) -> Batch:
        preprocessing = self.tokenizer.preprocessing
        size = preprocessing.image_size
        image = torch.zeros(1, preprocessing.channels, size, size, device=next(self.tokenizer.parameters()).device)
        return Batch(image, torch.zeros(1, dtype=torch.int64), [""], [""])

    def _show(self, pairs: Tensor, step: int, trackers: Trackers | None) -> None:
        """Pairs uint8 `(N, 2, H, W, 3)`, images beside their reconstructions."""
        scale = enlargement(pairs.shape[2:4])
        picture = grid(pairs.flatten(0, 1), 2 * min(PAIRS_OF_A_ROW, len(pairs)), scale)
        write_bytes(self.run / PICTURES / f"{self.stage}-{step:08d}.png", png_bytes(picture))
        if trackers is not None:
            trackers.show("reconstructions", picture, step)

    def _keep_best(
        self, step: int, found: Mapping[str, Mapping[str, float]], averaged: Mapping[str, Tensor] | None
    ) -> None:
        """Write the weights, raw and averaged, where what will be used of them is better than all before."""
        best = self.options.best
        if best is None:
            return
        which = "ema" if averaged is not None else "weights"
        if best.metric not in found[which]:
            raise UserError(
                f"train.{self.tokenizer.kind}.validation.best: {best.metric!r} cannot be told of images of "
                f"{self.tokenizer.preprocessing.image_size} pixels, which are too small for it"
            )
        value = found[which][best.metric]
        sign = 1 if best.prefer == "higher" else -1
        if self.best is not None and sign * value <= sign * self.best:
            return
        self.best = value
        own, averages = whole((self.tokenizer.state_dict(), averaged))
        if distributed.rank() == 0:
            folder = self.run / f"{self.tokenizer.kind}-best"
            self.tokenizer.save_pretrained(folder, averages, own)
            write_json(folder / "best.json", {"step": step, "weights": which, best.metric: value})


@contextmanager
def replaced(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The module with other weights, for a while."""
    tensors = module.state_dict()
    own = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        tensor.copy_(weights[name])
    try:
        yield
    finally:
        # Asked for again: that drops what sharded modules have gathered meanwhile.
        for name, tensor in module.state_dict().items():
            tensor.copy_(own[name])


def _advice(metric: str) -> str:
    """What would have it measured."""
    if metric != "rfid":
        return ""
    known = ", ".join(registry().names("features"))
    how = f"one of {known}" if known else "of which none is installed (smalti-eval brings some)"
    return f": it needs validation.features, {how}"


def _pooled(features: Features, images: Tensor) -> Tensor:
    """Features `(N, D)` on the CPU, of images uint8 `(N, H, W, 3)`."""
    found: dict[str, Tensor] = features(images)
    if "pool" not in found:
        name = type(features).__name__
        raise UserError(f"{name} gives the features {', '.join(found)}; a Frechet distance needs pool")
    return found["pool"].flatten(1).cpu()
