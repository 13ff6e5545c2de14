"""A network that helps in training and is never trained itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn


class Frozen(nn.Module):
    """Holds a network in evaluation mode, without gradients to its weights.

    The network moves between devices with its owner, but is no part of the owner's parameters and state dict: its
    weights come from a file of their own and need not be in every checkpoint.
    """

    network: nn.Module

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        # Not through `nn.Module.__setattr__`, which would register it.
        self.__dict__["network"] = network.requires_grad_(False).eval()

    def forward(self, *inputs: Any) -> Any:
        """What the network makes of the inputs, with gradients to them."""
        return self.network(*inputs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.network._apply(fn, recurse)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self
