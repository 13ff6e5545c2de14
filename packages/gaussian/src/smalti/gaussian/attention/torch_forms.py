"""Multi-scale deformable attention in plain torch: `grid_sample` for gradients, `embedding_bag` on the CPU without.

Shapes and results of both are those of `smalti.gaussian.attention.deformable`, in one floating type.

Legend: B batch, Q queries, M heads, D width of a head, L levels, P points of a level, S positions of all levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_grids(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """The reference: one `grid_sample` per level, differentiable once.

    Args:
        value: `(B, S, M, D)`.
        shapes: height and width of every level.
        locations: `(B, Q, M, L, P, 2)`.
        weights: `(B, Q, M, L, P)`.

    Returns:
        `(B, Q, M * D)`.
    """
    batch, _, heads, dim = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    output = value.new_zeros(batch * heads, dim, queries)
    maps = value.split([height * width for height, width in shapes], dim=1)
    for level, (height, width) in enumerate(shapes):
        grids = maps[level].permute(0, 2, 3, 1).reshape(batch * heads, dim, height, width)
        where = locations[:, :, :, level].transpose(1, 2).reshape(batch * heads, queries, points, 2)
        # What lies outside, infinite or NaN too, becomes a location that integers hold; it has no gradient.
        size = where.new_tensor((width, height))
        pixels = where * size - 0.5
        where = torch.where(((pixels > -1) & (pixels < size)).all(-1, keepdim=True), where, -2)
        samples = F.grid_sample(grids, 2 * where - 1, mode="bilinear", padding_mode="zeros", align_corners=False)
        weight = weights[:, :, :, level].transpose(1, 2).reshape(batch * heads, 1, queries, points)
        output = output + (samples * weight).sum(-1)
    return output.view(batch, heads * dim, queries).transpose(1, 2)


@torch.no_grad()
def sum_in_bags(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """What `sample_grids` computes, without gradients, on a CPU: neighbours are gathered and summed in one pass.

    Along an axis of n pixels, pixel i counts max(0, 1 - |x - i|) at x. The two pixels looked at always lie inside,
    so that this alone gives zeros outside: the lower one is at most n - 2.
    """
    batch, positions, heads, dim = value.shape
    levels, points = locations.shape[3:5]
    table = value.reshape(batch * positions * heads, dim)
    index = torch.int32 if len(table) < 2**31 else torch.int64
    sizes = torch.tensor(shapes, dtype=index)
    starts = sizes.prod(1).cumsum(0, dtype=index) - sizes.prod(1)
    # Repeated, as arithmetic on runs of P numbers would be slow.
    heights, widths, starts = (
        x[:, None].expand(heads, levels, points).contiguous() for x in (*sizes.unbind(1), starts)
    )
    left, (near_x, far_x) = _neighbours(locations[..., 0], widths)
    top, (near_y, far_y) = _neighbours(locations[..., 1], heights)
    firsts = starts * heads + torch.arange(heads, dtype=index)[:, None, None]
    rows = top.to(index).mul_(widths).add_(left.to(index)).mul_(heads).add_(firsts)
    rows += torch.arange(batch, dtype=index)[:, None, None, None, None] * (positions * heads)
    # On an axis of one pixel both are the same one, and the second counts nothing.
    right, below = heads * (widths > 1), heads * widths * (heights > 1)

    bags = (batch * locations.shape[1] * heads, levels * points)
    output = table.new_zeros(bags[0], dim)
    for counts_y, line in ((near_y.mul_(weights), rows), (far_y.mul_(weights), rows + below)):
        for counts_x, neighbours in ((near_x, line), (far_x, line + right)):
            counts = (counts_y * counts_x).view(bags)
            output += F.embedding_bag(neighbours.view(bags), table, per_sample_weights=counts, mode="sum")
    return output.view(batch, locations.shape[1], heads * dim)


def _neighbours(locations: Tensor, sizes: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Along one axis: the lower pixel of the two at every location, and what it and the next count."""
    # What is not a number lies outside.
    pixels = (locations * sizes).sub_(0.5).nan_to_num_(-2)
    lower = pixels.floor().clamp_(min=0).minimum((sizes - 2).clamp(min=0))
    pixels -= lower
    near = (1 - pixels.abs()).clamp_(min=0)
    far = (1 - pixels.sub_(1).abs_()).clamp_(min=0).mul_(sizes > 1)
    return lower, (near, far)
