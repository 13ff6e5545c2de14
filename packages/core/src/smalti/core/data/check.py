"""Looking through a data set: how many images of which class and size, and which are damaged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from smalti.core.data.dataset import ImageDataset, Record
from smalti.core.data.decode import decode_whole
from smalti.core.data.parallel import in_order
from smalti.core.errors import UserError


@dataclass
class Findings:
    """What was found.

    Attributes:
        labels: images by label, damaged ones left out.
        sizes: images by (width, height).
        damaged: a sentence about each image or file that cannot be read.
    """

    labels: Counter[int] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    damaged: list[str] = field(default_factory=list)

    def sentences(self, dataset: ImageDataset) -> Iterator[str]:
        """The findings in words."""
        count, classes = self.labels.total(), len(dataset.classes)
        yield f"{dataset.name}: {count} images of {classes} classes, {len(self.damaged)} damaged"
        if count:
            per_class = [self.labels[label] for label in range(classes)]
            yield f"  {min(per_class)} to {max(per_class)} images per class"
            small, large = min(self.sizes, key=min), max(self.sizes, key=max)
            if len(self.sizes) == 1:
                yield f"  all of {small[0]}x{small[1]} pixels"
            else:
                yield f"  {len(self.sizes)} sizes, from {small[0]}x{small[1]} to {large[0]}x{large[1]} pixels"
        for sentence in self.damaged:
            yield f"  damaged: {sentence}"


def check(dataset: ImageDataset, workers: int, advance: Callable[[int], None]) -> Findings:
    """Read and decode every image.

    Args:
        dataset: what is looked through.
        workers: threads.
        advance: told of each image.
    """
    findings = Findings()
    for part in dataset.parts():
        try:
            for label, found in in_order(_look, part, workers):
                advance(1)
                if isinstance(found, str):
                    findings.damaged.append(found)
                else:
                    findings.labels[label] += 1
                    findings.sizes[found] += 1
        except UserError as error:  # of the file that holds them; other parts may be whole
            findings.damaged.append(str(error))
    return findings


def _look(record: Record) -> tuple[int, tuple[int, int] | str]:
    """The label, and width and height or what is wrong."""
    try:
        _, height, width = decode_whole(record.image, 3, record.box).shape
    except UserError as error:
        return record.label, f"image {record.key!r}: {error}"
    return record.label, (width, height)
