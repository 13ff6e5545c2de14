"""Quantizer dropout: how many levels or scales a training step keeps (SoundStream, section III-C; ImageFolder).

What is drawn follows from a counter of steps alone, so that a resumed run goes on as the unbroken one.

Legend: B batch, K scales.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from smalti.core.noise import mixed_seed


def drawn_levels(step: int, lowest: int, levels: int, multiple: int) -> int:
    """A number of levels between `lowest` and `levels`, rounded up to a multiple of `multiple`.

    The same on all processes, which must skip the same levels, and for all branches of a product.
    """
    drawn = random.Random(mixed_seed("levels", "dropout", step)).randint(lowest, levels)
    return min(-(-drawn // multiple) * multiple, levels)


# An operator, since it looks at a value: torch.compile then keeps one graph.
@torch.library.custom_op("smalti::drawn_scales", mutates_args=())
def drawn_scales(step: Tensor, batch: int, share: float, lowest: int, scales: int, rank: int) -> Tensor:
    """For every sample a number of scales to keep, int64 `(B,)` on the device of `step`.

    Args:
        step: the counter, a scalar.
        batch: B.
        share: of the samples, the first ones, that get a random number; the others keep all.
        lowest: the smallest random number.
        scales: K, the largest.
        rank: of the process; each draws for samples of its own.
    """
    kept = [scales] * batch
    source = random.Random(mixed_seed("scales", "dropout", int(step), rank))
    kept[: int(batch * share)] = [source.randint(lowest, scales) for _ in range(int(batch * share))]
    return torch.tensor(kept, device=step.device)


@drawn_scales.register_fake
def _(step: Tensor, batch: int, share: float, lowest: int, scales: int, rank: int) -> Tensor:
    return step.new_empty(batch, dtype=torch.int64)
