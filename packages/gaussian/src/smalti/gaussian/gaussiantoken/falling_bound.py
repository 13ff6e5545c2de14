"""An upper bound that falls in training, faster where what it limits is large."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smalti.core import distributed


class FallingBound(nn.Module):
    """The largest scale that Gaussians may have (GaussianToken, Dong et al. 2025), with all it needs to go on.

    Every update moves the running mean of what is limited, then the bound towards `final`, by `rate` times how far
    that mean lies above the middle between `lowest` and the bound, and by `rate * step` at least.

    Args:
        start: the bound before the first update.
        final: the bound in the end.
        lowest: of what is limited.
        rate: see above.
        step: see above.
        share: of a new mean in the running mean, which starts in the middle.

    Attributes:
        bound: a scalar.
        mean: the running mean, a scalar.
    """

    bound: Tensor
    mean: Tensor

    def __init__(
        self, start: float, final: float, *, lowest: float, rate: float = 1e-3, step: float = 0.01, share: float = 0.01
    ) -> None:
        super().__init__()
        self.final, self.lowest, self.rate, self.step, self.share = final, lowest, rate, step, share
        self.register_buffer("bound", torch.tensor(start))
        self.register_buffer("mean", torch.tensor((lowest + start) / 2))

    @torch.no_grad()
    def update(self, mean: Tensor) -> None:
        """Take in the mean of what is limited, of one training batch; that of all processes is their average."""
        mean = distributed.all_reduce_sum(mean.detach().to(self.mean, copy=True)) / distributed.world_size()
        self.mean.lerp_(mean, self.share)
        fall = self.rate * (self.mean - (self.bound + self.lowest) / 2).clamp(min=self.step)
        self.bound.copy_(torch.where(self.bound > self.final, (self.bound - fall).clamp(min=self.final), self.bound))
