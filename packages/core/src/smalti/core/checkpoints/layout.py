"""What a published layout is: how to tell it, what it configures, and where its tensors belong."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from torch import Tensor

from smalti.core.checkpoints.rules import Rule

Shapes = Mapping[str, tuple[int, ...]]
"""The shape of every entry of a published state dict, by its name."""


class CheckpointLayout(ABC):
    """One published layout of weights.

    Attributes:
        name: what it is registered under, kind `checkpoint`.
        ignored: patterns (of `fnmatch`) of the entries that only training or logging needs.
        container: key under which the publisher's pickles hold the state dict; None where it is the whole file.
    """

    name: ClassVar[str]
    ignored: ClassVar[tuple[str, ...]] = ()
    container: ClassVar[str | None] = None

    @abstractmethod
    def recognises(self, shapes: Shapes) -> bool:
        """Whether these are the names and shapes of this layout."""

    @abstractmethod
    def config(self, shapes: Shapes) -> dict[str, Any]:
        """The configuration of the module, as its `from_config` takes it, with `kind`.

        It follows from names and shapes; what these cannot tell has the published value.
        """

    @abstractmethod
    def rules(self, config: Mapping[str, Any]) -> Sequence[Rule]:
        """How names translate, for a configuration that `config` gave."""

    def select(self, tensors: Mapping[str, Tensor], *, ema: bool) -> Mapping[str, Tensor]:
        """The state dict proper, where a file holds averaged weights under names of their own."""
        del ema
        return tensors

    def overrides(self, published: Mapping[str, Any]) -> list[str]:
        """What the publisher's `config.json` tells beside names and shapes, as overrides of our options."""
        del published
        return []

    def is_ignored(self, name: str) -> bool:
        """Whether the entry `name` is one that only training or logging needs."""
        return any(fnmatchcase(name, pattern) for pattern in self.ignored)


def count(shapes: Shapes, pattern: str) -> int:
    """How many values the one `{}` in `pattern` takes among the names: `count(shapes, "encoder.down.{}.")`.

    The pattern is the beginning of names; the placeholder stands for a number.
    """
    before, _, after = pattern.partition("{}")
    numbers = set()
    for name in shapes:
        if name.startswith(before):
            number, dot, rest = name[len(before) :].partition(".")
            if number.isdigit() and (dot + rest).startswith(after):
                numbers.add(int(number))
    return len(numbers)
