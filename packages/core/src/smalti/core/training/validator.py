"""A look at held-out images in the midst of a tokenizer's training: metrics, pictures, and the best weights so far.

Legend: N images, C channels, H W pixels, D feature width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from smalti.core.contracts import Features, Tokenizer
from smalti.core.data.dataset import ImageDataset
from smalti.core.data.images import grid, png_bytes, to_uint8
from smalti.core.data.loader import read_images
from smalti.core.errors import UserError
from smalti.core.files import write_bytes, write_json
from smalti.core.metrics import pair_metrics
from smalti.core.progress import Reporter
from smalti.core.run_folder import RunFolder
from smalti.core.training.options import Validation
from smalti.core.training.trackers import Trackers

BEST = "tokenizer-best"
PICTURES = "images"
PAIRS_OF_A_ROW = 4
VISIBLE = 128  # pixels: smaller images are enlarged in pictures by whole factors


class Validator:
    """Reconstructs the same images every time.

    Args:
        options: what to measure, and when.
        tokenizer: in training.
        dataset: of the held-out images.
        run: takes pictures and the best weights.
        stage: names the pictures.
        reporter: told about images that cannot be decoded.
        max_undecodable: of those, that may be left out.

    Raises:
        UserError: a metric that is not installed, or the best of something that is not measured.
    """

    def __init__(
        self,
        options: Validation,
        tokenizer: Tokenizer,
        dataset: ImageDataset,
        *,
        run: RunFolder,
        stage: str,
        reporter: Reporter,
        max_undecodable: int,
    ) -> None:
        self.options, self.tokenizer = options, tokenizer
        self.dataset, self.max_undecodable = dataset, max_undecodable
        self.run, self.stage, self.reporter = run, stage, reporter
        self.metrics = pair_metrics(options.metrics)
        self.features = options.features.build().eval() if options.features is not None else None
        measured = [*self.metrics, *(["rfid"] if self.features is not None else [])]
        if options.best is not None and options.best.metric not in measured:
            raise UserError(
                f"train.tokenizer.validation.best: {options.best.metric!r} is not measured, "
                f"only {', '.join(measured) or 'nothing'} is"
            )
        self.best: float | None = None
        self._images: list[Tensor] = []

    def is_due(self, step: int) -> bool:
        """Whether it is time after so many updates."""
        return step % self.options.every == 0

    def __call__(
        self, step: int, averaged: Mapping[str, Tensor] | None, trackers: Trackers | None
    ) -> dict[str, dict[str, float]]:
        """Measure, show, and keep the weights if they are the best; leaves the tokenizer in evaluation mode.

        Args:
            step: updates so far.
            averaged: weights that are measured as well.
            trackers: shown the pictures.

        Returns:
            Means over the images by metric, under `weights`, and under `ema` for averaged ones.
        """
        if not self._images:
            self._images = [*self._read()]
        self.tokenizer.eval()
        found = {"weights": self._measured()}
        if averaged is not None:
            with replaced(self.tokenizer, averaged):
                found["ema"] = self._measured()
                self._show(step, trackers)
        else:
            self._show(step, trackers)
        self._keep_best(step, found, averaged)
        return found

    def state_dict(self) -> dict[str, Any]:
        """What it remembers."""
        return {"best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.best = state["best"]

    def _read(self) -> Iterator[Tensor]:
        device = next(self.tokenizer.parameters()).device
        for batch in read_images(
            self.dataset,
            self.tokenizer.preprocessing,
            self.options.batch_size,
            0,
            min(self.options.images, len(self.dataset)),
            max_undecodable=self.max_undecodable,
            warn=self.reporter.say,
        ):
            yield batch.images.to(device)
        if self.features is not None:
            self.features.to(device)

    @torch.no_grad()
    def _measured(self) -> dict[str, float]:
        values: dict[str, list[float]] = {name: [] for name in self.metrics}
        real: list[Tensor] = []
        made: list[Tensor] = []
        channels = self.tokenizer.preprocessing.channels
        for images in self._images:
            originals, copies = to_uint8(images), to_uint8(self.tokenizer.decode(self.tokenizer.encode(images)))
            planes = [pixels[..., :channels].movedim(-1, 1) for pixels in (copies, originals)]
            for name, metric in self.metrics.items():
                values[name] += metric.compute(planes[0], planes[1]).tolist()
            if self.features is not None:
                real.append(_pooled(self.features, originals))
                made.append(_pooled(self.features, copies))
        found = {name: fmean(numbers) for name, numbers in values.items()}
        return found | ({"rfid": frechet_distance(torch.cat(real), torch.cat(made))} if real else {})

    @torch.no_grad()
    def _show(self, step: int, trackers: Trackers | None) -> None:
        count = self.options.pictures
        if not count:
            return
        images = torch.cat(self._images[: -(-count // self.options.batch_size)])[:count]
        copies = self.tokenizer.decode(self.tokenizer.encode(images))
        pairs = torch.stack([to_uint8(images), to_uint8(copies)], 1).flatten(0, 1).cpu()
        scale = max(1, VISIBLE // max(images.shape[-2:]))
        picture = grid(pairs, 2 * min(PAIRS_OF_A_ROW, len(images)), scale)
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
        value = found[which][best.metric]
        sign = 1 if best.prefer == "higher" else -1
        if self.best is not None and sign * value <= sign * self.best:
            return
        self.best = value
        self.tokenizer.save_pretrained(self.run / BEST, averaged)
        write_json(self.run / BEST / "best.json", {"step": step, "weights": which, best.metric: value})


@contextmanager
def replaced(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """The module with other weights, for a while."""
    tensors = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    own = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        tensor.copy_(weights[name])
    try:
        yield
    finally:
        for name, tensor in tensors.items():
            tensor.copy_(own[name])


def frechet_distance(real: Tensor, made: Tensor) -> float:
    """The squared Frechet distance between Gaussians fitted to two sets of features `(N, D)` (Heusel et al. 2017).

    With centred features X and Y the trace of the root of the product of both covariances is the sum of the singular
    values of X Y^T / (N - 1): a matrix of images, which are few here, and not of features.

    Raises:
        UserError: fewer than two images.
    """
    if len(real) < 2:
        raise UserError(f"a Frechet distance needs at least 2 images, got {len(real)}")
    sets = [features.double() for features in (real, made)]
    means = [features.mean(0) for features in sets]
    x, y = (features - mean for features, mean in zip(sets, means, strict=True))
    variances = (x.square().sum() + y.square().sum()) / (len(x) - 1)
    root = torch.linalg.svdvals(x @ y.T).sum() / (len(x) - 1)
    return max(float((means[0] - means[1]).square().sum() + variances - 2 * root), 0.0)


def _pooled(features: Features, images: Tensor) -> Tensor:
    """Features `(N, D)` on the CPU, of images uint8 `(N, H, W, 3)`."""
    found: dict[str, Tensor] = features(images)
    return found["pool"].flatten(1).cpu()
