"""The dependency between two branches of a latent (XQ-GAN).

Legend: B batch, d width of a branch.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from smalti.core.losses.branches import branch_latent, branch_width
from smalti.core.losses.loss import Loss, Model, Reconstruction
from smalti.core.options import LossOptions


class DependencyOptions(LossOptions):
    """Options of `Dependency`.

    Args:
        branches: the latent's channels are cut into so many equal branches.
    """

    name: Literal["dependency"] = "dependency"
    branches: Annotated[int, Field(ge=2)] = 2

    def build(self) -> Dependency:
        """Build it."""
        return Dependency(self)


class Dependency(Loss):
    """Mean cosine between the means over positions of the first and the last branch of the latent.

    Pulled down, the branches point elsewhere for the same image; see `factorized` for its like at every position.
    """

    def __init__(self, options: DependencyOptions) -> None:
        super().__init__()
        self.options = options

    def attach(self, model: Model) -> None:
        """Check that there are such branches."""
        branch_width(model, self.options.branches)

    def forward(self, output: Reconstruction, images: Tensor, step: int) -> Tensor:
        """The mean over the batch, in [-1, 1]."""
        first, last = (
            branch_latent(output, self.options.branches, branch).flatten(1, -2).float().mean(1) for branch in (0, -1)
        )
        return F.cosine_similarity(first, last, dim=-1).mean()
