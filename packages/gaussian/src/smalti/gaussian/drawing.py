"""Drawing Gaussians as what they are: outlines of ellipses.

Shapes: B images, N Gaussians, C channels, H W pixels.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from smalti.core.errors import UserError
from smalti.gaussian.gaussians import Gaussians

CORNERS = 24  # of the polygon that stands for an ellipse
OVERSAMPLING = 2  # pictures are drawn larger and reduced, so that thin lines are smooth
BACKGROUND = (255, 255, 255)
SHADE = 0.8  # of colours, so that white ellipses are seen on white


def draw_ellipses(
    means: Tensor,
    scales: Tensor,
    rotations: Tensor,
    colours: Tensor,
    height: int,
    width: int,
    *,
    grid: tuple[int, int] | None = None,
) -> NDArray[np.uint8]:
    """Draw every Gaussian as the outline of its ellipse, on white; the large ones first, so that none hides.

    An outline lies one standard deviation from the centre.

    Args:
        means: [N, 2], centres (x, y), [-1, 1] spans the picture.
        scales: [N, 2], standard deviations along the axes, in pixels of `grid`.
        rotations: [N], radians, as in `rasterize_gaussians_2d`.
        colours: [N, 3] or [N, 1] in [0, 1], clamped, drawn a little darker.
        height: rows of the picture.
        width: columns of the picture.
        grid: rows and columns that `scales` are measured on, by default those of the picture.

    Returns:
        [height, width, 3].

    Raises:
        UserError: colours of another number of channels.
    """
    if colours.shape[-1] not in (1, 3):
        raise UserError(f"ellipses have the colours of 1 or 3 channels, got {colours.shape[-1]}")
    rows, columns = grid or (height, width)
    outlines = _outlines(means, scales, rotations, rows, columns)
    outlines *= np.array((width / columns, height / rows)) * OVERSAMPLING
    inks = _inks(colours)
    canvas = Image.new("RGB", (width * OVERSAMPLING, height * OVERSAMPLING), BACKGROUND)
    pen = ImageDraw.Draw(canvas)
    for index in np.argsort(-scales.detach().cpu().double().prod(-1).numpy(), kind="stable"):
        pen.polygon(outlines[index].ravel().tolist(), outline=inks[index], width=OVERSAMPLING)
    return np.asarray(canvas.reduce(OVERSAMPLING))


def draw_on_images(gaussians: Gaussians, images: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The ellipses of many images, each in the colour that its image has at its centre.

    Args:
        gaussians: [B, N], scales in pixels of `grid`.
        images: [B, C, H, W] in [-1, 1], C is 1 or 3.
        grid: rows and columns.
        size: rows and columns of the pictures.

    Returns:
        Uint8 [B, 3, *size].
    """
    means = gaussians.means.to(images)
    found = F.grid_sample(images, means[:, None], padding_mode="border", align_corners=False)[:, :, 0]
    colours = (found.mT + 1) / 2
    pictures = [
        draw_ellipses(
            means[place], gaussians.scales[place], gaussians.rotations[place], colours[place], *size, grid=grid
        )
        for place in range(len(images))
    ]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def _outlines(means: Tensor, scales: Tensor, rotations: Tensor, rows: int, columns: int) -> NDArray[np.float64]:
    """Corners (x, y) in pixels of the grid, [N, CORNERS, 2]; the axes are the columns of R."""
    centres, axes, angles = (tensor.detach().cpu().double().numpy() for tensor in (means, scales, rotations))
    turns = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
    along, across = axes[:, :1] * np.cos(turns), axes[:, 1:] * np.sin(turns)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    offsets = np.stack((cos * along + sin * across, -sin * along + cos * across), -1)
    middles = (centres + 1) / 2 * np.array((columns, rows))
    return np.asarray(middles[:, None] + offsets)


def _inks(colours: Tensor) -> list[tuple[int, int, int]]:
    levels = (colours.detach().cpu().double().clamp(0, 1) * 255 * SHADE).round().expand(-1, 3).int().tolist()
    return [(red, green, blue) for red, green, blue in levels]
