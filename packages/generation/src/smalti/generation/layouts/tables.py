"""Rules for the tables of 1d-tokenizer's generators, which hold more rows than are used or several tables in one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smalti.core.checkpoints.rules import Rename, Rule


@dataclass(frozen=True)
class Rows(Rule):
    """Some rows of a published table `(1, total, D)`; those that no model reads are zero on the way back.

    Args:
        published: its name.
        ours: our name, of the rows `(count, D)`.
        start: the first row.
        count: of rows.
        total: rows of the published table.
    """

    published: str
    ours: str
    start: int
    count: int
    total: int

    def to_ours(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the published name."""
        if self.published not in tensors:
            return {}
        return {self.ours: tensors.pop(self.published)[0, self.start : self.start + self.count]}

    def to_published(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """To the published name."""
        if self.ours not in tensors:
            return {}
        rows = tensors.pop(self.ours)
        table = rows.new_zeros(1, self.total, rows.shape[1])
        table[0, self.start : self.start + self.count] = rows
        return {self.published: table}


@dataclass(frozen=True)
class JointTable(Rule):
    """One published table for codes, mask, classes and null class, in this order; two here.

    Args:
        published: its name.
        codes: our name, of the codes, and perhaps the mask behind them.
        classes: our name, of the classes and the null class.
        vocab: how many codes.
        masked: whether the mask is used; else its row is zero on the way back.
    """

    published: str
    codes: str
    classes: str
    vocab: int
    masked: bool

    def to_ours(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the published name."""
        if self.published not in tensors:
            return {}
        table = tensors.pop(self.published)
        return {self.codes: table[: self.vocab + self.masked], self.classes: table[self.vocab + 1 :]}

    def to_published(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """To the published name."""
        if not {self.codes, self.classes} <= tensors.keys():
            return {}
        codes, classes = tensors.pop(self.codes), tensors.pop(self.classes)
        between = [] if self.masked else [torch.zeros_like(codes[:1])]
        return {self.published: torch.cat([codes, *between, classes])}


@dataclass(frozen=True)
class SummedTables(Rule):
    """Positions, and a table whose first row is added at all of them: one table here; back it comes with zeros.

    Args:
        positions: published name.
        kinds: published name, of two rows.
        ours: our name, of the sum.
    """

    positions: str
    kinds: str
    ours: str

    def to_ours(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the published names."""
        if not {self.positions, self.kinds} <= tensors.keys():
            return {}
        return {self.ours: tensors.pop(self.positions) + tensors.pop(self.kinds)[0]}

    def to_published(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """To the published names."""
        if self.ours not in tensors:
            return {}
        positions = tensors.pop(self.ours)
        return {self.positions: positions, self.kinds: positions.new_zeros(2, positions.shape[1])}


@dataclass(frozen=True)
class Reordered(Rule):
    """Equal parts of a tensor, one after the other along its first axis, in another order.

    Args:
        renamed: the names.
        order: for each of our parts, the number of the published one.
    """

    renamed: Rename
    order: tuple[int, ...]

    def to_ours(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the published names."""
        return {name: self._parts(tensor, self.order) for name, tensor in self.renamed.to_ours(tensors).items()}

    def to_published(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """To the published names."""
        back = tuple(self.order.index(part) for part in range(len(self.order)))
        return {name: self._parts(tensor, back) for name, tensor in self.renamed.to_published(tensors).items()}

    @staticmethod
    def _parts(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
        parts = tensor.chunk(len(order))
        return torch.cat([parts[part] for part in order])
