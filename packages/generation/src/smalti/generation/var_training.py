"""What changes over VAR's training: how many scales it learns (VAR), how many words are masked (ImageFolder).

Legend: B batch, L token positions, D width of the model.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from smalti.core.options import Options


class Growth(Options):
    """Progressive training: coarse scales first, then more and more, evenly in time.

    Args:
        first: scales until `start`.
        start: step at which the number begins to grow (VAR: the end of the warm-up).
        end: step from which on there are all of them.
        ramp: steps over which the weight of a scale that was added rises to 1.
        lowest: that weight in the beginning.
    """

    first: Annotated[int, Field(ge=1)] = 5
    start: Annotated[int, Field(ge=0)] = 0
    end: Annotated[int, Field(ge=1)]
    ramp: Annotated[int, Field(ge=1)] = 1
    lowest: Annotated[float, Field(ge=0, le=1)] = 0.01

    @field_validator("end")
    @classmethod
    def _comes_last(cls, end: int, info: ValidationInfo) -> int:
        start = info.data.get("start")
        if start is not None and end < start:
            raise ValueError(f"growth cannot end before it starts, at step {start}")
        return end

    def scales(self, step: int, count: int) -> int:
        """How many of `count` scales are learned at a step."""
        if step >= self.end:
            return count
        progress = max(step - self.start, 0) / max(self.end - self.start, 1)
        return self.first + math.floor(progress * (count - self.first) + 0.5)

    def weight(self, step: int, count: int) -> float:
        """Of the finest of these scales in the loss."""
        scales = self.scales(step, count)
        if scales == self.first:
            return 1.0
        share = (scales - self.first - 0.5) / (count - self.first)
        began = min(math.ceil(self.start + share * (self.end - self.start)), self.end)
        return min(max((step - began) / self.ramp, self.lowest), 1.0)


class Masking(Options):
    """Words that are replaced by a learned one, of every sample a share drawn uniformly up to a bound that falls to 0.

    Args:
        share: the bound at step 0.
        steps: at which it is 0.
    """

    share: Annotated[float, Field(gt=0, le=1)]
    steps: Annotated[int, Field(ge=1)]

    def bound(self, step: int) -> float:
        """The largest share at a step."""
        return self.share * max(1 - step / self.steps, 0.0)


def drawn_mask(words: Tensor, bound: Tensor) -> Tensor:
    """Which words `(B, L, D)` are replaced, bool `(B, L)`: of every sample a share drawn uniformly up to `bound`."""
    shares = torch.rand(len(words), 1, device=words.device) * bound
    return torch.rand(words.shape[:2], device=words.device) < shares
