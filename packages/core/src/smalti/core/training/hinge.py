"""The hinge form of the adversarial objective (Lim and Ye 2017, Geometric GAN)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def hinge_generator(generated: Tensor) -> Tensor:
    """`-mean D(generated)`, for logits of any shape."""
    return -generated.mean()


def hinge_discriminator(real: Tensor, generated: Tensor) -> Tensor:
    """Half of `mean max(0, 1 - D(real)) + mean max(0, 1 + D(generated))`, for logits of any shape."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + generated).mean())
