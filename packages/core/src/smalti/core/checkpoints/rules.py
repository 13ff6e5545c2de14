"""Rules that translate the names of a published state dict into ours and back.

A pattern is a dotted name with placeholders: `{level}` stands for one part of the name, a final `*` for all that
remains. The same placeholders appear on both sides, so that a rule works in both directions.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

_PLACEHOLDER = re.compile(r"\{(\w+)\}")


class Rule(ABC):
    """How some tensors move from one state dict to the other.

    Both methods take the entries that they understand out of `tensors` and return them under the other names.
    """

    @abstractmethod
    def to_ours(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the published names."""

    @abstractmethod
    def to_published(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """To the published names."""


@dataclass(frozen=True)
class Rename(Rule):
    """One tensor under another name.

    Args:
        published: pattern of the published name.
        ours: pattern of our name.
        reverse: placeholders that count from the other end, with how many there are: `{"level": 5}` turns 0 into 4.
        pointwise: a published 1 x 1 convolution `(O, I, 1, 1)` is a linear layer `(O, I)` here; other shapes stay.
        squeeze: a published tensor has that many leading axes of size 1 that ours lacks, e.g. `(1, N, D)` for `(N, D)`.
    """

    published: str
    ours: str
    reverse: Mapping[str, int] = field(default_factory=dict)
    pointwise: bool = False
    squeeze: int = 0

    def to_ours(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the published names."""
        return {ours: self._ours(tensor) for ours, (tensor,) in self._moved(tensors, self.published, self.ours)}

    def to_published(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """To the published names."""
        moved = self._moved(tensors, self.ours, self.published)
        return {published: self._published(tensor, published) for published, (tensor,) in moved}

    def _moved(self, tensors: dict[str, Tensor], source: str, target: str) -> list[tuple[str, tuple[Tensor]]]:
        names = {name: found for name in tensors if (found := _match(source, name, self.reverse)) is not None}
        return [(_filled(target, found, self.reverse), (tensors.pop(name),)) for name, found in names.items()]

    def _ours(self, tensor: Tensor) -> Tensor:
        for _ in range(self.squeeze):
            tensor = tensor.squeeze(0)
        return tensor[:, :, 0, 0] if self.pointwise and tensor.shape[2:] == (1, 1) else tensor

    def _published(self, tensor: Tensor, name: str) -> Tensor:
        for _ in range(self.squeeze):
            tensor = tensor.unsqueeze(0)
        return tensor[:, :, None, None] if self.pointwise and tensor.ndim == 2 and name.endswith("weight") else tensor


@dataclass(frozen=True)
class Fused(Rule):
    """Several published tensors that are one here, concatenated along their first axis in the order given.

    Args:
        published: patterns of the published names, e.g. of queries, keys and values.
        ours: pattern of our name.
        reverse: as for `Rename`.
        pointwise: as for `Rename`.
    """

    published: Sequence[str]
    ours: str
    reverse: Mapping[str, int] = field(default_factory=dict)
    pointwise: bool = False

    def to_ours(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the published names."""
        parts = [
            Rename(pattern, self.ours, self.reverse, self.pointwise).to_ours(tensors) for pattern in self.published
        ]
        complete = set(parts[0]).intersection(*parts[1:])
        # An incomplete group goes nowhere, so that what is missing is reported under our name.
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name in complete}

    def to_published(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """To the published names."""
        found = {}
        names = [name for name in tensors if _match(self.ours, name) is not None]
        for name in names:
            chunks = tensors.pop(name).chunk(len(self.published))
            for pattern, chunk in zip(self.published, chunks, strict=True):
                found.update(Rename(pattern, self.ours, self.reverse, self.pointwise).to_published({name: chunk}))
        return found


def _match(pattern: str, name: str, counted: Iterable[str] = ()) -> dict[str, str] | None:
    """The values of the placeholders; those that are counted are numbers."""
    found = _compiled(pattern).fullmatch(name)
    if found is None or not all(found[placeholder].isdecimal() for placeholder in counted):
        return None
    return found.groupdict()


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\{\w+\}|\*$)", pattern)
    return re.compile(
        "".join(
            f"(?P<{part[1:-1]}>[^.]+)" if _PLACEHOLDER.fullmatch(part)
            else "(?P<rest>.+)" if part == "*"
            else re.escape(part)
            for part in parts
        )
    )  # fmt: skip


def _filled(pattern: str, found: Mapping[str, str], reverse: Mapping[str, int]) -> str:
    values = {name: str(reverse[name] - 1 - int(value)) if name in reverse else value for name, value in found.items()}
    return _PLACEHOLDER.sub(lambda placeholder: values[placeholder[1]], pattern).replace("*", values.get("rest", ""))


def to_ours(rules: Sequence[Rule], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Translate a published state dict; the first rule that matches a name takes it.

    Returns:
        The tensors under our names, and the published names that no rule took, sorted.
    """
    remaining, ours = dict(tensors), dict[str, Tensor]()
    for rule in rules:
        ours.update(rule.to_ours(remaining))
    return ours, sorted(remaining)


def to_published(rules: Sequence[Rule], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Translate our state dict; also returns our names that no rule took, sorted."""
    remaining, published = dict(tensors), dict[str, Tensor]()
    for rule in rules:
        published.update(rule.to_published(remaining))
    return published, sorted(remaining)
