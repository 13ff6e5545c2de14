"""Convolution between Gaussians that lie near each other.

Legend: B images, N Gaussians of an image, E width, H W grid.
"""

from __future__ import annotations

from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from smalti.core.options import Options


class SparseConvolutionOptions(Options):
    """Options of `SparseConvolution`.

    Args:
        kernel: side of the neighbourhood in cells of the feature map, odd.
        projected: whether a linear layer follows.
    """

    kernel: Annotated[int, Field(ge=1)] = 5
    projected: bool = False

    @model_validator(mode="after")
    def _odd(self) -> Self:
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}")
        return self


class SparseConvolution(nn.Module):
    """Gaussians are sorted into the cells of a grid, and every occupied cell sums over its neighbourhood.

    Submanifold sparse convolution (Graham et al. 2018): empty cells count as 0 and get nothing. The Gaussians of one
    cell enter as their average and leave with the same result. GaussianToken's own begins its grid at the smallest
    centre of the whole batch, so that the result for an image depends on the others, and lets one Gaussian of a
    cell, no matter which, stand for all of them; the grid here is that of the feature map.

    Args:
        width: E.
        options: see `SparseConvolutionOptions`.
    """

    def __init__(self, width: int, options: SparseConvolutionOptions) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, options.kernel, padding=options.kernel // 2, bias=False)
        self.out = nn.Linear(width, width) if options.projected else nn.Identity()

    def forward(self, features: Tensor, centres: Tensor, height: int, width: int) -> Tensor:
        """Features `(B, N, E)` to the same.

        Args:
            features: of the Gaussians.
            centres: `(B, N, 2)`, x and y in [0, 1].
            height: H.
            width: W.
        """
        column = (centres[..., 0].detach() * width).long().clamp(0, width - 1)
        row = (centres[..., 1].detach() * height).long().clamp(0, height - 1)
        cells = (row * width + column)[..., None]
        ones = torch.ones_like(features[..., :1])
        counts = features.new_zeros(len(features), height * width, 1).scatter_add(1, cells, ones)
        spread = cells.expand_as(features)
        sums = features.new_zeros(len(features), height * width, features.shape[-1]).scatter_add(1, spread, features)
        grid = (sums / counts.clamp(min=1)).transpose(1, 2).unflatten(2, (height, width))
        convolved = self.conv(grid).flatten(2).transpose(1, 2)
        result: Tensor = self.out(convolved.gather(1, spread))
        return result
