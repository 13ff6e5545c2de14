"""Averaged weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EMA:
    """An exponential moving average of a module's floating-point state.

    After update n (from 1) the decay is min(decay, (1 + n) / (10 + n)), so that the first updates do not
    keep the random start. Buffers are averaged as well, integers copied.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.weights = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards `module`."""
        self.updates += 1
        share = 1.0 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages, targets = [], []
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                averages.append(self.weights[name])
                targets.append(tensor.detach())
            else:
                self.weights[name].copy_(tensor)
        torch._foreach_lerp_(averages, targets, share)

    def state_dict(self) -> dict[str, int | dict[str, Tensor]]:
        """Everything needed to go on."""
        return {"updates": self.updates, "weights": self.weights}

    def load_state_dict(self, state: dict[str, int | dict[str, Tensor]]) -> None:
        """Go on from `state_dict()`."""
        updates, weights = state["updates"], state["weights"]
        assert isinstance(updates, int)
        assert isinstance(weights, dict)
        self.updates = updates
        for name, tensor in weights.items():
            self.weights[name].copy_(tensor)
