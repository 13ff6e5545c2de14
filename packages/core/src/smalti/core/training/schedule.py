"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from smalti.core.training.options import Optimization


def multiplier(optimization: Optimization, step: int) -> float:
    """What the learning rate is multiplied by at update `step` (from 0).

    Linear warm-up from 1 / warmup_steps, then constant, or half a cosine down to `final_ratio` at the last update
    (Loshchilov and Hutter 2017, without restarts).
    """
    warmup = optimization.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if optimization.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(optimization.steps - 1 - warmup, 1)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    return optimization.final_ratio + (1.0 - optimization.final_ratio) * cosine
