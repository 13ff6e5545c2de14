"""2-D Gaussians as one value: where they lie, how large and turned they are, what they carry.

Legend: B images, N Gaussians of an image, C features of a Gaussian.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from smalti.gaussian.rasterizer.rasterize import rasterize_gaussians_2d


@dataclass(frozen=True)
class Gaussians:
    """Gaussians on a map of some size in pixels; what `rasterize_gaussians_2d` draws.

    Args:
        means: `(B, N, 2)`, x to the right and y downwards, -1 and 1 the edges of the map.
        scales: `(B, N, 2)`, standard deviations along both axes, in pixels of the map.
        rotations: `(B, N)`, of the axes, in radians.
        features: `(B, N, C)`.
        opacities: `(B, N)`.
    """

    means: Tensor
    scales: Tensor
    rotations: Tensor
    features: Tensor
    opacities: Tensor

    def carrying(self, features: Tensor) -> Gaussians:
        """The same with other features `(B, N, C)`."""
        return Gaussians(self.means, self.scales, self.rotations, features, self.opacities)

    def enlarged(self, factor: float) -> Gaussians:
        """The same on a map of `factor` times as many rows and columns."""
        return Gaussians(self.means, factor * self.scales, self.rotations, self.features, self.opacities)

    def rasterize(self, height: int, width: int, **settings: Any) -> Tensor:
        """Their sum `(B, C, height, width)`; `settings` are options of `rasterize_gaussians_2d`."""
        return rasterize_gaussians_2d(
            self.means, self.scales, self.rotations, self.features, self.opacities, height, width, **settings
        )
