"""Averaged weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from smalti.core.training.sharding import divided, local

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
        state = module.state_dict(keep_vars=True)
        self.weights = {name: tensor.detach().clone() for name, tensor in state.items()}
        # A state dict takes longer to make than the average: only where its tensors lie is found out now.
        places: dict[int, tuple[dict[str, Any], str]] = {
            id(tensor): (tensors, name)
            for part in module.modules()
            for tensors in (part._parameters, part._buffers)
            for name, tensor in tensors.items()
        }
        found = [(self.weights[name], *places[id(tensor)]) for name, tensor in state.items()]
        floating = [(average, where, name) for average, where, name in found if average.is_floating_point()]
        self._averages = [local(average) for average, _, _ in floating]
        self._averaged = [(where, name) for _, where, name in floating]
        self._copied = [place for place in found if not place[0].is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards what the module holds now."""
        self.updates += 1
        share = 1.0 - ema_decay(self.decay, self.warmup, self.updates)
        # Looked up each time: a module may put another tensor in the place of a buffer.
        targets = [local(tensors[name]) for tensors, name in self._averaged]
        torch._foreach_lerp_(self._averages, targets, share)
        for average, tensors, name in self._copied:
            average.copy_(tensors[name])

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on."""
        return {"updates": self.updates, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`, with whole tensors."""
        self.updates = int(state["updates"])
        for name, average in self.weights.items():
            average.copy_(divided(state["weights"][name], average))
