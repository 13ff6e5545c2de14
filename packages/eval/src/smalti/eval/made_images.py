"""Images that are made while they are measured: reconstructions of a tokenizer, samples of a generator.

Legend: B batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from smalti.core.contracts import Tokenizer
from smalti.core.data.images import to_uint8
from smalti.core.errors import UserError
from smalti.core.recipe import load_recipe
from smalti.core.sampling.run import LARGEST_BATCH
from smalti.core.stages.sample import sampling_of
from smalti.core.weights import fingerprint
from smalti.eval.image_source import ImageBatch, ImageSource


class TokenizerImages(ImageSource):
    """What a tokenizer makes of the images of another source, at 8 bits.

    Args:
        tokenizer: in evaluation mode, on its device.
        originals: images as the tokenizer takes them.
    """

    made_by = "tokenizer"

    def __init__(self, tokenizer: Tokenizer, name: str, originals: ImageSource, device: str) -> None:
        self.tokenizer, self.originals, self.device = tokenizer, originals, device
        self.classes = originals.classes
        self.title = f"reconstructions of {originals.title} by {name}, {fingerprint(tokenizer, tokenizer.config())}"

    def __len__(self) -> int:
        return len(self.originals)

    @property
    def labels(self) -> Tensor:
        """Those of the originals."""
        return self.originals.labels

    def batches(self, size: int, rank: int, world_size: int) -> Iterator[ImageBatch]:
        """As promised."""
        for batch in self.originals.batches(size, rank, world_size):
            pixels = taken_pixels(batch.images, self.tokenizer, self.originals.title, self.device)
            layout = self.tokenizer.layout((pixels.shape[2], pixels.shape[3]))
            copies = self.tokenizer.decode(self.tokenizer.encode(pixels), layout)
            yield ImageBatch(to_uint8(copies).cpu(), batch.indices, batch.names)


def taken_pixels(images: Tensor, tokenizer: Tokenizer, title: str, device: str) -> Tensor:
    """Images uint8 `(B, H, W, 3)` of the source `title` as a tokenizer takes them, `(B, C, H, W)` in [-1, 1].

    Raises:
        UserError: they have colours, and the tokenizer takes grey.
    """
    channels = tokenizer.preprocessing.channels
    if channels == 1 and bool((images != images[..., :1]).any()):
        raise UserError(f"{title} holds images in colour, but the tokenizer takes grey ones: bring them to grey first")
    return images[..., :channels].movedim(-1, 1).to(device).float() / 127.5 - 1


class GeneratorImages(ImageSource):
    """What the generator of a run draws, with the recipe's settings: the same images as `smalti sample` writes.

    Args:
        run: a run folder with `tokenizer/` and `generator/`.
        count: how many instead of the recipe's.
        device: where they are made.

    Raises:
        UserError: no such run, or as `sampling_of`.
    """

    made_by = "generator"

    def __init__(self, run: Path, count: int | None, device: str) -> None:
        recipe = load_recipe(str(run))
        self.sampling = sampling_of(run, recipe, device)
        self.classes = self.sampling.names
        self.together = self.sampling.options.batch_size or LARGEST_BATCH
        self.count = count or self.sampling.count
        generator = self.sampling.generator
        identity = fingerprint(generator, generator.config())
        self.title = f"samples of {run}, {identity}, {self.sampling.settings.model_dump_json()}"

    def __len__(self) -> int:
        return self.count

    @property
    def labels(self) -> Tensor:
        """The classes that the samples are drawn for."""
        return self.sampling.labels_of(torch.arange(self.count))

    def share(self, size: int, rank: int, world_size: int) -> int:
        """As promised, of the recipe's batches."""
        return super().share(self.together, rank, world_size)

    def batches(self, size: int, rank: int, world_size: int) -> Iterator[ImageBatch]:
        """As promised, in the recipe's batches whatever `size` is: every sample is computed in the same company."""
        starts = range(0, self.count, self.together)
        for start in starts[rank::world_size]:
            indices = torch.arange(start, min(start + self.together, self.count))
            images = self.sampling.images(indices)
            yield ImageBatch(images.cpu(), indices, [str(index) for index in indices.tolist()])
