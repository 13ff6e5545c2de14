"""The learning rate and the weight decay as functions of the step."""

from __future__ import annotations

import math
from itertools import pairwise

from smalti.core.training.options import Optimization


def multiplier(optimization: Optimization, step: int) -> float:
    """What the learning rate is multiplied by at update `step` (from 0).

    Linear warm-up, then what `schedule` says; the cosine is that of Loshchilov and Hutter 2017, without restarts.
    """
    warmup = optimization.warmup_steps
    if step < warmup:
        if optimization.warmup_from is None:
            return (step + 1) / warmup
        return optimization.warmup_from + (1.0 - optimization.warmup_from) * step / warmup
    if optimization.schedule == "constant":
        return 1.0
    first = 0 if optimization.schedule_under_warmup else warmup
    progress = min((step - first) / max(optimization.steps - 1 - first, 1), 1.0)
    if optimization.schedule == "cosine":
        return optimization.final_ratio + (1.0 - optimization.final_ratio) * _half_cosine(progress)
    if optimization.schedule == "steps":
        return [1.0, *(ratio for place, ratio in optimization.knots if place <= progress)][-1]
    return _between(optimization, progress)


def weight_decay(optimization: Optimization, step: int) -> float:
    """The weight decay at update `step` (from 0), of the parameters that have any."""
    last = optimization.final_weight_decay
    if last is None:
        return optimization.weight_decay
    progress = min(step / max(optimization.steps - 1, 1), 1.0)
    return last + (optimization.weight_decay - last) * _half_cosine(progress)


def _between(optimization: Optimization, progress: float) -> float:
    """Interpolation between the knots, the first (0, 1) and the last (1, final_ratio)."""
    points = [(0.0, 1.0), *optimization.knots, (1.0, optimization.final_ratio)]
    for (left, before), (right, after) in pairwise(points):
        if progress < right:
            share = (progress - left) / (right - left)
            if optimization.schedule == "exponential":
                return float(before * (after / before) ** share)
            return before + share * (after - before)
    return optimization.final_ratio


def _half_cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))
