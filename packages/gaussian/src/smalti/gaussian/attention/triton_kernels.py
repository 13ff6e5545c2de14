"""Multi-scale deformable attention as Triton kernels, forward and backward, and the operators around them.

Nothing is added atomically, so that the same inputs give the same bytes on one device: for the gradient of the value,
the neighbours of all samples are sorted by pixel, and each pixel sums its own. With `TRITON_INTERPRET=1` the kernels
run on the CPU.

Legend: B batch, Q queries, M heads, D width of a head, L levels, P points of a level, S positions of all levels,
R rows B × Q × M.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers of one program: rows × the width of a head, and samples that a pixel sums at once.
NUMBERS, SAMPLES = 256, 16


def sample_fused(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """What `smalti.gaussian.attention.torch_forms.sample_grids` computes, differentiable once.

    Args:
        value: float32 or float64 `(B, S, M, D)` on a GPU.
        shapes: height and width of every level.
        locations: `(B, Q, M, L, P, 2)` of the same type.
        weights: `(B, Q, M, L, P)` of the same type.

    Returns:
        `(B, Q, M * D)`.
    """
    output: Tensor = _sample(value, [size for shape in shapes for size in shape], locations, weights)
    return output


@torch.library.custom_op("smalti::deformable_attention", mutates_args=())
def _sample(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    batch, queries, heads = weights.shape[:3]
    output = value.new_empty(batch, queries, heads * value.shape[3])
    sizes = _sizes(value, weights)
    with torch.cuda.device_of(value):
        _forward[_grid(sizes)](
            value.contiguous(),
            _levels(tuple(shapes), value.device),
            locations.contiguous(),
            weights.contiguous(),
            output,
            **sizes,
        )
    return output


@_sample.register_fake
def _(value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor) -> Tensor:
    batch, queries, heads = weights.shape[:3]
    return value.new_empty(batch, queries, heads * value.shape[3])


@torch.library.custom_op("smalti::deformable_attention_backward", mutates_args=())
def _sample_backward(
    grad: Tensor, value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad, locations, weights = grad.contiguous(), locations.contiguous(), weights.contiguous()
    grad_value, grad_locations, grad_weights = map(torch.empty_like, (value.contiguous(), locations, weights))
    sizes = _sizes(value, weights)
    # The four neighbours of every sample: row of the value, one past its end where there is none, and coefficient.
    pixels = value.shape[:3].numel()
    index = torch.int32 if pixels < 2**31 - 1 else torch.int64
    neighbours = weights.new_empty(weights.numel(), 4, dtype=index)
    counts = weights.new_empty(weights.numel(), 4)
    with torch.cuda.device_of(value):
        _backward[_grid(sizes)](
            value.contiguous(),
            _levels(tuple(shapes), value.device),
            locations,
            weights,
            grad,
            grad_locations,
            grad_weights,
            neighbours,
            counts,
            **sizes,
        )
        neighbours, order = neighbours.flatten().sort(stable=True)
        bounds = torch.searchsorted(neighbours, torch.arange(pixels + 1, dtype=index, device=value.device))
        _collect[(pixels,)](
            grad,
            counts,
            order,
            bounds,
            grad_value,
            value.shape[3],
            4 * weights.shape[3:].numel(),
            sample_block=SAMPLES,
            dim_block=sizes["dim_block"],
        )
    return grad_value, grad_locations, grad_weights


@_sample_backward.register_fake
def _(
    grad: Tensor, value: Tensor, shapes: Sequence[int], locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return value.new_empty(value.shape), locations.new_empty(locations.shape), weights.new_empty(weights.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, ctx.shapes, locations, weights = inputs
    ctx.save_for_backward(value, locations, weights)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    value, locations, weights = ctx.saved_tensors
    grad_value, grad_locations, grad_weights = _sample_backward(grad, value, ctx.shapes, locations, weights)
    return grad_value, None, grad_locations, grad_weights


_sample.register_autograd(_gradient, setup_context=_save)


def _sizes(value: Tensor, weights: Tensor) -> dict[str, int]:
    dim_block = triton.next_power_of_2(max(value.shape[3], 1))
    return {
        "rows": weights.shape[:3].numel(),
        "queries": weights.shape[1],
        "heads": weights.shape[2],
        "levels": weights.shape[3],
        "points": weights.shape[4],
        "positions": value.shape[1],
        "dim": value.shape[3],
        "row_block": max(1, NUMBERS // dim_block),
        "dim_block": dim_block,
    }


def _grid(sizes: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(sizes["rows"], sizes["row_block"]),)


@lru_cache(maxsize=64)
def _levels(shapes: tuple[int, ...], device: torch.device) -> Tensor:
    """Height, width and first position of every level, int32: kept, as copying to a GPU would wait for it."""
    levels, start = [], 0
    for height, width in zip(shapes[::2], shapes[1::2], strict=True):
        levels.append((height, width, start))
        start += height * width
    return torch.tensor(levels, dtype=torch.int32, device=device)


@triton.jit  # type: ignore[untyped-decorator]
def _place(locations: tl.tensor, sample: tl.tensor, here: tl.tensor, height: tl.tensor, width: tl.tensor) -> Any:
    """Where samples lie: the upper left pixel, how far they are from it, and which lie inside."""
    kind: tl.constexpr = locations.dtype.element_ty
    x = tl.load(locations + 2 * sample, mask=here, other=0) * width.to(kind) - 0.5
    y = tl.load(locations + 2 * sample + 1, mask=here, other=0) * height.to(kind) - 0.5
    inside = here & (x > -1) & (x < width) & (y > -1) & (y < height)
    # Integers hold what is inside; what is not finite is not.
    x = tl.where(inside, x, 0)
    y = tl.where(inside, y, 0)
    left = tl.floor(x)
    top = tl.floor(y)
    return top.to(tl.int32), left.to(tl.int32), y - top, x - left, inside


@triton.jit  # type: ignore[untyped-decorator]
def _neighbour(
    first: tl.tensor,
    top: tl.tensor,
    left: tl.tensor,
    inside: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    heads: tl.tensor,
    head: tl.tensor,
) -> Any:
    """The row of the value that holds a pixel of a level with the given first position, and whether there is one."""
    exists = inside & (top >= 0) & (top < height) & (left >= 0) & (left < width)
    return (first + top * width + left) * heads + head, exists


@triton.jit  # type: ignore[untyped-decorator]
def _forward(
    value: tl.tensor,
    shapes: tl.tensor,
    locations: tl.tensor,
    weights: tl.tensor,
    output: tl.tensor,
    rows: tl.tensor,
    queries: tl.tensor,
    heads: tl.tensor,
    levels: tl.tensor,
    points: tl.tensor,
    positions: tl.tensor,
    dim: tl.tensor,
    row_block: tl.constexpr,
    dim_block: tl.constexpr,
) -> None:
    kind: tl.constexpr = value.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * row_block + tl.arange(0, row_block)
    column = tl.arange(0, dim_block)[None]
    here = row < rows
    head = row % heads
    total = tl.zeros((row_block, dim_block), kind)
    for level in range(levels):
        height = tl.load(shapes + 3 * level)
        width = tl.load(shapes + 3 * level + 1)
        first = row // heads // queries * positions + tl.load(shapes + 3 * level + 2)
        for point in range(points):
            sample = (row * levels + level) * points + point
            top, left, y, x, inside = _place(locations, sample, here, height, width)
            weight = tl.load(weights + sample, mask=here, other=0)
            for below in tl.static_range(2):
                for right in tl.static_range(2):
                    at, exists = _neighbour(first, top + below, left + right, inside, height, width, heads, head)
                    count = (y if below else 1 - y) * (x if right else 1 - x)
                    pixel = tl.load(value + at[:, None] * dim + column, mask=exists[:, None] & (column < dim), other=0)
                    total += (weight * count)[:, None] * pixel
    tl.store(output + row[:, None] * dim + column, total, mask=here[:, None] & (column < dim))


@triton.jit  # type: ignore[untyped-decorator]
def _backward(
    value: tl.tensor,
    shapes: tl.tensor,
    locations: tl.tensor,
    weights: tl.tensor,
    grad: tl.tensor,
    grad_locations: tl.tensor,
    grad_weights: tl.tensor,
    neighbours: tl.tensor,
    counts: tl.tensor,
    rows: tl.tensor,
    queries: tl.tensor,
    heads: tl.tensor,
    levels: tl.tensor,
    points: tl.tensor,
    positions: tl.tensor,
    dim: tl.tensor,
    row_block: tl.constexpr,
    dim_block: tl.constexpr,
) -> None:
    kind: tl.constexpr = value.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * row_block + tl.arange(0, row_block)
    column = tl.arange(0, dim_block)[None]
    here = row < rows
    head = row % heads
    # Of every image; the rows of the value end there.
    end = rows // heads // queries * positions * heads
    upstream = tl.load(grad + row[:, None] * dim + column, mask=here[:, None] & (column < dim), other=0)
    for level in range(levels):
        height = tl.load(shapes + 3 * level)
        width = tl.load(shapes + 3 * level + 1)
        first = row // heads // queries * positions + tl.load(shapes + 3 * level + 2)
        for point in range(points):
            sample = (row * levels + level) * points + point
            top, left, y, x, inside = _place(locations, sample, here, height, width)
            weight = tl.load(weights + sample, mask=here, other=0)
            along = tl.zeros((row_block,), kind)
            along_x = tl.zeros((row_block,), kind)
            along_y = tl.zeros((row_block,), kind)
            for below in tl.static_range(2):
                for right in tl.static_range(2):
                    at, exists = _neighbour(first, top + below, left + right, inside, height, width, heads, head)
                    count_x = x if right else 1 - x
                    count_y = y if below else 1 - y
                    pixel = tl.load(value + at[:, None] * dim + column, mask=exists[:, None] & (column < dim), other=0)
                    product = tl.sum(upstream * pixel, 1)
                    along += count_x * count_y * product
                    along_x += count_y * (product if right else -product)
                    along_y += count_x * (product if below else -product)
                    entry = 4 * sample + 2 * below + right
                    tl.store(neighbours + entry, tl.where(exists, at, end).to(neighbours.dtype.element_ty), mask=here)
                    tl.store(counts + entry, weight * count_x * count_y, mask=here)
            tl.store(grad_weights + sample, along, mask=here)
            tl.store(grad_locations + 2 * sample, along_x * weight * width.to(kind), mask=here)
            tl.store(grad_locations + 2 * sample + 1, along_y * weight * height.to(kind), mask=here)


@triton.jit  # type: ignore[untyped-decorator]
def _collect(
    grad: tl.tensor,
    counts: tl.tensor,
    order: tl.tensor,
    bounds: tl.tensor,
    grad_value: tl.tensor,
    dim: tl.tensor,
    entries: tl.tensor,
    sample_block: tl.constexpr,
    dim_block: tl.constexpr,
) -> None:
    """Sum what the samples near one pixel send back to it; `entries` is how many there are of one row."""
    kind: tl.constexpr = grad.dtype.element_ty
    pixel = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, dim_block)
    last = tl.load(bounds + pixel + 1)
    total = tl.zeros((dim_block,), kind)
    for first in range(tl.load(bounds + pixel), last, sample_block):
        place = first + tl.arange(0, sample_block)
        here = place < last
        entry = tl.load(order + place, mask=here, other=0)
        count = tl.load(counts + entry, mask=here, other=0)
        mask = here[:, None] & (column < dim)[None]
        upstream = tl.load(grad + (entry // entries)[:, None] * dim + column[None], mask=mask, other=0)
        total += tl.sum(count[:, None] * upstream, 0)
    tl.store(grad_value + pixel * dim + column, total, mask=column < dim)
