"""What masked generation needs beside a network: schedules, masks of training, and which tokens stay (MaskGIT).

Legend: B batch, N tokens of a sample.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Schedule = Literal["arccos", "cosine", "linear", "square", "root"]
"""The share of masked tokens as it falls from 1 to 0 (Chang et al. 2022, section 3.3)."""

SMALLEST = 1e-20
"""Below it no logarithm of noise is taken."""


def masked_share(progress: Tensor, schedule: Schedule) -> Tensor:
    """The share of masked tokens, 1 at progress 0 and 0 at progress 1."""
    if schedule == "arccos":
        return progress.acos() / (math.pi / 2)
    if schedule == "cosine":
        return (progress * (math.pi / 2)).cos()
    return 1 - progress ** {"linear": 1.0, "square": 2.0, "root": 0.5}[schedule]


def random_mask(batch: int, length: int, schedule: Schedule, device: torch.device) -> Tensor:
    """Which tokens are masked in training, bool `(B, N)`: at least one of every sample, by torch's global generator.

    The progress of each sample is uniform in [0, 1), so the density of the shares follows from the schedule.
    """
    shares = masked_share(torch.rand(batch, 1, device=device), schedule)
    counts = (shares * length).round().clamp(min=1)
    return torch.rand(batch, length, device=device).argsort(1) < counts


def masked_counts(length: int, steps: int, schedule: Schedule) -> list[int]:
    """How many of N tokens are masked after each step of sampling.

    Every step before the last leaves at least one masked and fixes at least one, as long as there are more; the last
    one leaves none.
    """
    progress = torch.arange(1, steps, dtype=torch.float64) / steps
    counts, masked = [], length
    for share in masked_share(progress, schedule).tolist():
        masked = max(1, min(masked - 1, math.floor(length * share)))
        counts.append(masked)
    return [*counts, 0]


def least_confident(confidence: Tensor, count: int) -> Tensor:
    """True for the `count` tokens of every sample with the lowest confidence `(B, N)`, the first ones among equals."""
    lowest = confidence.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(confidence, dtype=torch.bool).scatter_(1, lowest, True)


def gumbel(uniform: Tensor) -> Tensor:
    """Gumbel noise out of uniform noise in [0, 1)."""
    return -(-uniform.clamp(min=SMALLEST).log()).clamp(min=SMALLEST).log()
