"""Averaged weights."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Warmup = Literal["none", "ramp", "power"]


def ema_decay(decay: float, warmup: Warmup, update: int) -> float:
    """The decay of update n (from 1): at most `decay`, and at first less, so that the random start is soon forgotten.

    `ramp` is (1 + n) / (10 + n), as in TensorFlow; `power` 1 - (1 + n)^(-2/3), as in k-diffusion.
    """
    match warmup:
        case "none":
            return decay
        case "ramp":
            return min(decay, (1 + update) / (10 + update))
        case "power":
            return float(min(decay, 1.0 - (1 + update) ** (-2 / 3)))


class EMA:
    """An exponential moving average of a module's floating-point state.

    Buffers are averaged as well, integers copied.

    Args:
        module: whose state is the start.
        decay: weight of the past.
        warmup: how the decay begins, see `ema_decay`.
    """

    def __init__(self, module: nn.Module, decay: float, warmup: Warmup = "ramp") -> None:
        self.decay = decay
        self.warmup: Warmup = warmup
        self.updates = 0
        self.weights = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards `module`."""
        self.updates += 1
        share = 1.0 - ema_decay(self.decay, self.warmup, self.updates)
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
