"""Losses between reconstructions and images that need no network."""

from __future__ import annotations

from typing import Literal

from torch import nn

from smalti.core.options import LossOptions


class L1Options(LossOptions):
    """Mean absolute difference over all elements."""

    name: Literal["l1"] = "l1"

    def build(self) -> nn.Module:
        """Build it."""
        return nn.L1Loss()


class L2Options(LossOptions):
    """Mean squared difference over all elements."""

    name: Literal["l2"] = "l2"

    def build(self) -> nn.Module:
        """Build it."""
        return nn.MSELoss()
