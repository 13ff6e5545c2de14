"""Losses between the pixels of reconstructions and images."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from smalti.core.losses.loss import Loss, Reconstruction
from smalti.core.options import LossOptions


class L1Options(LossOptions):
    """Mean absolute difference over all elements."""

    name: Literal["l1"] = "l1"

    def build(self) -> L1:
        """Build it."""
        return L1()


class L2Options(LossOptions):
    """Mean squared difference over all elements."""

    name: Literal["l2"] = "l2"

    def build(self) -> L2:
        """Build it."""
        return L2()


class CharbonnierOptions(LossOptions):
    """Options of `Charbonnier`.

    Args:
        epsilon: below differences of about this size the loss is quadratic, above it absolute.
    """

    name: Literal["charbonnier"] = "charbonnier"
    epsilon: Annotated[float, Field(gt=0)] = 1e-3

    def build(self) -> Charbonnier:
        """Build it."""
        return Charbonnier(self)


class L1(Loss):
    """Mean absolute difference over all elements."""

    def forward(self, output: Reconstruction, images: Tensor, step: int) -> Tensor:
        """The mean."""
        return F.l1_loss(output.images, images)


class L2(Loss):
    """Mean squared difference over all elements."""

    def forward(self, output: Reconstruction, images: Tensor, step: int) -> Tensor:
        """The mean."""
        return F.mse_loss(output.images, images)


class Charbonnier(Loss):
    """Mean of `sqrt(difference^2 + epsilon^2)`, a smooth absolute difference (Charbonnier et al. 1994)."""

    def __init__(self, options: CharbonnierOptions) -> None:
        super().__init__()
        self.options = options

    def forward(self, output: Reconstruction, images: Tensor, step: int) -> Tensor:
        """The mean."""
        return torch.sqrt((output.images - images).square() + self.options.epsilon**2).mean()
