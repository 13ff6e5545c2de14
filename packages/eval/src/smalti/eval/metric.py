"""Metrics of sets of images: taken in batch by batch, merged exactly over processes.

Legend: B batch, H W pixels, D feature width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from copy import copy, deepcopy
from typing import ClassVar, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from smalti.core.contracts import Features
from smalti.core.distributed import gather_objects
from smalti.core.errors import UserError

State = dict[str, Tensor]


class Accumulator(Protocol):
    """What gathers the features of one set."""

    def update(self, features: Tensor, indices: Tensor | None = None) -> None:
        """Take in features `(B, D)`, those of the images at `indices` `(B,)` of the set."""

    def merge(self, other: Self) -> None:
        """Take in what `other` has seen."""

    def state_dict(self) -> State:
        """What it has seen."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""

    def to(self, device: str | torch.device) -> Self:
        """Keep everything on `device` from now on."""


A = TypeVar("A", bound=Accumulator)
R = TypeVar("R")


class Metric(ABC, Generic[A, R]):
    """A figure of samples, most often against references.

    It is used as metrics of torchmetrics are: `update` with every batch, `compute` whenever the figure is wanted,
    `reset` to begin again. Samples and references may come in any order and in batches of any size.

    Args:
        samples: an empty accumulator.
        extractor: makes features of images; None takes features.
        output: which features of the extractor.

    Attributes:
        definition: the figure in words, for protocols.
        samples: what was gathered of the samples.
        references: and of the references.
    """

    definition: str
    looks_at_references: ClassVar[bool] = True

    def __init__(self, samples: A, extractor: Features | None, output: str) -> None:
        self.samples, self.references = samples, deepcopy(samples)
        self._empty = deepcopy(samples)
        self.extractor, self.output = extractor, output

    @torch.no_grad()
    def update(self, values: Tensor, *, real: bool = False, indices: Tensor | None = None) -> Self:
        """Take in a batch of samples, or of references.

        Args:
            values: features `(B, D)` of any float type, or images uint8 `(B, H, W, 3)` where there is an extractor.
            real: these are references. A metric of samples alone takes no notice of them.
            indices: int64 `(B,)`, the places of the images in the whole set, for figures that depend on the order;
                given always or never. The default is the order of arrival.

        Raises:
            UserError: features of another shape than before, or that are not finite; an index for the second time.
        """
        if real and not self.looks_at_references:
            return self
        if self.extractor is not None:
            outputs = self.extractor(values)
            if self.output not in outputs:
                raise UserError(f"the extractor gives no {self.output!r}, only {', '.join(outputs)}")
            values = outputs[self.output]
        (self.references if real else self.samples).update(values, indices)
        return self

    @abstractmethod
    def compute(self) -> R:
        """The figure of all that this process has seen.

        Raises:
            UserError: too few samples or references.
        """

    def reset(self) -> None:
        """Forget samples and references."""
        self.samples, self.references = deepcopy(self._empty), deepcopy(self._empty)

    def merge(self, other: Self) -> None:
        """Take in what another metric of the same kind has seen."""
        self.samples.merge(other.samples)
        self.references.merge(other.references)

    def state_dict(self) -> State:
        """All it has seen, as tensors."""
        parts = {"samples": self.samples.state_dict(), "references": self.references.state_dict()}
        return {f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        for part, accumulator in (("samples", self.samples), ("references", self.references)):
            own = {name.removeprefix(f"{part}."): state[name] for name in state if name.startswith(f"{part}.")}
            accumulator.load_state_dict(own)

    def to(self, device: str | torch.device) -> Self:
        """Gather on `device` from now on, and take the extractor there."""
        for accumulator in (self.samples, self.references, self._empty):
            accumulator.to(device)
        if self.extractor is not None:
            self.extractor.to(device)
        return self


class Mergeable(Protocol):
    """What processes can join: a `Metric`, a `PairMean`, `TokenStatistics`."""

    def reset(self) -> None:
        """Begin again."""

    def merge(self, other: Self) -> None:
        """Take in what `other` has seen."""

    def state_dict(self) -> State:
        """What it has seen."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""


M = TypeVar("M", bound=Mergeable)


def merged_over_processes(metric: M) -> M:
    """One that has seen what those of all processes have; every process must call it, and gets the same.

    The argument stays as it is.
    """
    merged, part = copy(metric), copy(metric)
    merged.reset()
    part.reset()
    for state in gather_objects({name: tensor.cpu() for name, tensor in metric.state_dict().items()}):
        part.load_state_dict(state)
        merged.merge(part)
    return merged
