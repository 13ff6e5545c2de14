"""What quantizers that are composed of other quantizers, their units, have in common.

Legend: B batch, L token positions, S streams, D latent width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Annotated, cast

import torch
from torch import Tensor, nn

from smalti.core.contracts import Quantized, Quantizer
from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout
from smalti.core.options import QuantizerOptions, Slot

Unit = Annotated[QuantizerOptions, Slot("quantizer")]


class Units(nn.ModuleList):
    """Quantizers in a row: the given ones, all of them `copies` times over, or one that stands at every place.

    Args:
        options: of the units.
        copies: how often the row is repeated.
        shared: build one unit only, for all places.

    Raises:
        UserError: several units where one is to be shared.
    """

    def __init__(self, options: Sequence[QuantizerOptions], copies: int, *, shared: bool) -> None:
        if shared and len(options) > 1:
            raise UserError(f"a shared quantizer is one quantizer, got {len(options)}")
        super().__init__(unit.build() for _ in range(1 if shared else copies) for unit in options)
        self.places = len(options) * copies

    def row(self) -> list[Quantizer]:
        """The unit at every place, in order."""
        units = [cast("Quantizer", unit) for unit in self]
        return units if len(units) == self.places else units * self.places


def joined_layout(units: Sequence[Quantizer], space: tuple[int, ...]) -> TokenLayout:
    """The layout of the tokens of several units side by side: their streams one after the other.

    Raises:
        UserError: units whose tokens lie at different positions.
    """
    layouts = [unit.layout(space) for unit in units]
    first = layouts[0]
    for layout in layouts[1:]:
        if (layout.kind, layout.shape) != (first.kind, first.shape):
            raise UserError(f"units side by side need tokens at the same positions, got {first} and {layout}")
    vocab = tuple(size for layout in layouts for size in layout.vocab)
    return TokenLayout(kind=first.kind, shape=first.shape, vocab=vocab)


def summed(losses: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The sum of loss terms, name by name."""
    total: dict[str, Tensor] = {}
    for terms in losses:
        for name, loss in terms.items():
            total[name] = total[name] + loss if name in total else loss
    return total


@contextmanager
def learning_once(unit: nn.Module) -> Iterator[None]:
    """Let a unit that is used several times in a step learn its statistics once, from all of them, at the end.

    Every module inside `unit` that has a method `deferred()`, a context manager, is asked to do so.
    """
    with ExitStack() as stack:
        for module in unit.modules():
            deferred = cast("Callable[[], AbstractContextManager[None]] | None", getattr(module, "deferred", None))
            if deferred is not None:
                stack.enter_context(deferred())
        yield


@torch.no_grad()
def searched(unit: Quantizer, latent: Tensor) -> Quantized:
    """What `unit` gives in evaluation mode: nothing is learned, and there are no losses and no gradients."""
    training = unit.training
    unit.eval()
    quantized: Quantized = unit(latent)
    unit.train(training)
    return quantized


def touched(unit: nn.Module) -> Tensor | float:
    """Zero, with a zero gradient for every weight of `unit`.

    Distributed training needs every weight in every backward pass, also those of a unit that was left out.
    """
    weights = [weight for weight in unit.parameters() if weight.requires_grad]
    return sum(0.0 * weight.sum() for weight in weights)
