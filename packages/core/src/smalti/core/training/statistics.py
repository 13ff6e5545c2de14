"""What a forward pass changes by itself: running statistics and codebooks, to be put back where no update follows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smalti.core.contracts import Quantizer


class Statistics:
    """A copy of everything that the forward pass of a model may change.

    That is its buffers, and the weights of its quantizers, which revive and initialise codes.

    Args:
        model: whose it is.
    """

    def __init__(self, model: nn.Module) -> None:
        tensors_of = {id(tensors): tensors for module in model.modules() for tensors in _changing(module)}
        self._places = [
            (tensors, name) for tensors in tensors_of.values() for name, tensor in tensors.items() if tensor is not None
        ]
        self._copies = [tensor.detach().clone() for tensor in self._tensors()]

    def hold(self) -> None:
        """Copy what is there now."""
        if self._copies:
            torch._foreach_copy_(self._copies, self._tensors())

    @torch.no_grad()
    def put_back(self) -> None:
        """Make the model's statistics those of the copy."""
        for tensor, copy in zip(self._tensors(), self._copies, strict=True):
            tensor.copy_(copy)

    def _tensors(self) -> list[Tensor]:
        # Looked up each time: a module may put another tensor in the place of a buffer.
        return [tensors[name].detach() for tensors, name in self._places]


def _changing(module: nn.Module) -> list[dict[str, Tensor]]:
    """The dictionaries of a module's own tensors that may change."""
    parameters = [part._parameters for part in module.modules()] if isinstance(module, Quantizer) else []
    return [module._buffers, *parameters]  # type: ignore[list-item]
