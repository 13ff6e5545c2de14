"""A look at a generator in the midst of its training: losses on held-out images, and pictures of fixed classes.

Legend: B batch, L token positions, S streams, K codes of a stream.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.core import distributed
from smalti.core.contracts import Generator, Tokenizer
from smalti.core.data.dataset import ImageDataset
from smalti.core.data.images import enlargement, grid, png_bytes, to_uint8
from smalti.core.data.loader import read_images
from smalti.core.errors import UserError
from smalti.core.files import write_bytes
from smalti.core.progress import Reporter
from smalti.core.run_folder import RunFolder
from smalti.core.training.options import GeneratorValidation
from smalti.core.training.sharding import is_sharded, whole
from smalti.core.training.trackers import Trackers
from smalti.core.training.validator import replaced

PICTURES = "drawn"
COLUMNS = 5


@runtime_checkable
class TeacherForced(Protocol):
    """A generator that gives the logits of all tokens at once."""

    def logits(self, tokens: Tensor, labels: Tensor) -> list[Tensor]:
        """For each stream `(B, L, K)`, of tokens `(B, L, S)` and labels `(B,)`."""


class GeneratorValidator:
    """Measures the same tokens and draws the same samples every time; every process does all of it, where it can.

    Args:
        options: what, and when.
        generator: in training.
        tokenizer: makes tokens of images and images of tokens.
        dataset: of the held-out images.
        run: takes the pictures.
        reporter: told about images that cannot be decoded.
        max_undecodable: of those, that may be left out.
    """

    def __init__(
        self,
        options: GeneratorValidation,
        generator: Generator,
        tokenizer: Tokenizer,
        dataset: ImageDataset,
        *,
        run: RunFolder,
        reporter: Reporter,
        max_undecodable: int,
    ) -> None:
        self.options, self.generator, self.tokenizer = options, generator, tokenizer
        self.dataset, self.run = dataset, run
        self.reporter, self.max_undecodable = reporter, max_undecodable
        self._batches: list[tuple[Tensor, Tensor]] = []

    def is_due(self, step: int) -> bool:
        """Whether it is time after so many updates."""
        return step % self.options.every == 0

    @torch.no_grad()
    def __call__(
        self, step: int, averaged: Mapping[str, Tensor] | None, trackers: Trackers | None
    ) -> dict[str, dict[str, float]]:
        """Measure and draw; leaves the generator in evaluation mode.

        Args:
            step: updates so far.
            averaged: weights that are measured as well, and in this case those that draw.
            trackers: shown the picture.

        Returns:
            The generator's losses by name under `weights`, and under `ema` for averaged ones; of tokens in scales also
            the cross entropy of scale k (and stream s, where there are several), `scale_k` or `scale_k_s`.
        """
        if not self._batches:
            self._batches = self._encoded()
        self.generator.eval()
        found = {"weights": self._measured()}
        if averaged is None:
            self._draw(step, trackers)
            return found
        with replaced(self.generator, averaged):
            found["ema"] = self._measured()
            self._draw(step, trackers)
        return found

    def state_dict(self) -> dict[str, Any]:
        """What it remembers: nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`."""
        del state

    @property
    def _device(self) -> torch.device:
        return next(self.generator.parameters()).device

    def _encoded(self) -> list[tuple[Tensor, Tensor]]:
        """Batches of tokens and labels of the held-out images."""
        self.tokenizer.eval().to(self._device)
        images = read_images(
            self.dataset,
            self.tokenizer.preprocessing,
            self.options.batch_size,
            0,
            min(self.options.images, len(self.dataset)),
            max_undecodable=self.max_undecodable,
            warn=self.reporter.say,
        )
        device = self._device
        found = [(self.tokenizer.encode(batch.images.to(device)), batch.labels.to(device)) for batch in images]
        if not found:
            raise UserError(f"there is no image in {self.dataset.name}, the recipe's data.validation")
        return found

    def _measured(self) -> dict[str, float]:
        """Means over all images."""
        torch.manual_seed(0)  # what is masked at random is the same every time; each update is seeded anew
        sums: dict[str, float] = {}
        for tokens, labels in self._batches:
            terms = {**self.generator(tokens, labels), **self._by_scale(tokens, labels)}
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) + float(term) * len(labels)
        images = sum(len(labels) for _, labels in self._batches)
        return {name: total / images for name, total in sums.items()}

    def _by_scale(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The cross entropy of each scale and stream."""
        layout = self.generator.token_layout
        if layout.kind != "scales" or not isinstance(self.generator, TeacherForced):
            return {}
        sizes = [math.prod(shape) for shape in layout.shape]
        found = {}
        for stream, logits in enumerate(self.generator.logits(tokens, labels)):
            losses = F.cross_entropy(logits.movedim(-1, 1), tokens[:, :, stream], reduction="none")
            for scale, part in enumerate(losses.split(sizes, dim=1)):
                found[f"scale_{scale}" if layout.streams == 1 else f"scale_{scale}_{stream}"] = part.mean()
        return found

    def _drawing(self) -> Generator | None:
        """What draws. Of a generator that is divided over processes that is a copy, on the first of them.

        Sampling goes through all blocks once for each token; gathering them each time would take far longer.
        """
        if not is_sharded(self.generator):
            return self.generator
        weights = whole(self.generator.state_dict())
        if distributed.rank() != 0:
            return None
        copy = type(self.generator).from_config(self.generator.config())
        copy.load_state_dict(weights)
        return copy.to(self._device).eval()

    def _draw(self, step: int, trackers: Trackers | None) -> None:
        count = self.options.pictures
        if not count:
            return
        generator = self._drawing()
        if generator is None:
            return
        labels = torch.arange(count, device=self._device) % generator.classes
        tokens = generator.sample(labels, self.options.sampling)
        images = to_uint8(self.tokenizer.decode(tokens, self.generator.token_layout)).cpu()
        if distributed.rank() != 0:
            return
        picture = grid(images, min(COLUMNS, count), enlargement(images.shape[1:3]))
        write_bytes(self.run / PICTURES / f"{step:08d}.png", png_bytes(picture))
        if trackers is not None:
            trackers.show("samples", picture, step)
