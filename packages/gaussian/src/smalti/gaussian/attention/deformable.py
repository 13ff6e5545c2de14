"""Multi-scale deformable attention: every query sums bilinear samples of feature maps at locations of its own.

Legend: B batch, Q queries, M heads, D width of a head, L levels, P points of a level, S positions of all levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.gaussian.attention.torch_forms import sample_grids, sum_in_bags


def multi_scale_deformable_attention(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """Sum the weighted samples of every query and head (Deformable DETR, arXiv 2010.04159, equation 3).

    A location (x, y) spans a level by [0, 1]: the middle of pixel (row i, column j) of an H × W level is at
    ((j + 0.5) / W, (i + 0.5) / H). Samples are bilinear, with zeros outside the level; a location that is not finite
    lies outside. Under autocast, and for half-precision inputs, everything runs in float32, and so is the result.

    Args:
        value: `(B, S, M, D)`, the levels one after the other, each row by row.
        shapes: height and width of every level; S is the sum of their products.
        locations: `(B, Q, M, L, P, 2)`, x then y.
        weights: `(B, Q, M, L, P)`, usually with the sum 1 over the points of all levels.

    Returns:
        `(B, Q, M * D)`, float32, or float64 where an input is; differentiable once.

    Raises:
        UserError: shapes that do not go together, inputs that are not floats or on several devices.
    """
    _check(value, shapes, locations, weights)
    dtype = torch.float64 if torch.float64 in (value.dtype, locations.dtype, weights.dtype) else torch.float32
    with torch.autocast(value.device.type, enabled=False):
        value, locations, weights = value.to(dtype), locations.to(dtype), weights.to(dtype)
        return _backend(value, locations, weights)(value, shapes, locations, weights)


def _backend(value: Tensor, locations: Tensor, weights: Tensor) -> Callable[..., Tensor]:
    if _has_kernels(value.device.type):
        from smalti.gaussian.attention.triton_kernels import sample_fused

        return sample_fused
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in (value, locations, weights))
    # Bags take half the time of grids or less, but twice the time where there are gradients.
    return sum_in_bags if value.device.type == "cpu" and not differentiated else sample_grids


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_kernels(device: str) -> bool:
    return device == "cuda" and find_spec("triton") is not None


def _check(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> None:
    if value.ndim != 4:
        raise UserError(f"value must have the shape (batch, positions, heads, width), got {tuple(value.shape)}")
    if not shapes or any(len(shape) != 2 or min(shape) < 1 for shape in shapes):
        raise UserError(f"shapes must give the height and width, each at least 1, of every level, got {shapes!r}")
    batch, positions, heads, _ = value.shape
    if sum(height * width for height, width in shapes) != positions:
        raise UserError(f"the positions of value must be those of the levels {list(shapes)!r}, got {positions}")
    wanted = (batch, "queries", heads, len(shapes), "points")
    for name, tensor, shape in (("locations", locations, (*wanted, 2)), ("weights", weights, wanted)):
        got = tuple(tensor.shape)
        if len(got) != len(shape) or any(b != a for a, b in zip(shape, got, strict=True) if isinstance(a, int)):
            raise UserError(f"{name} must have the shape ({', '.join(map(str, shape))}), got {got}")
    if locations.shape[:-1] != weights.shape:
        raise UserError(
            f"locations and weights must have as many queries and points, got {tuple(locations.shape)} "
            f"and {tuple(weights.shape)}"
        )
    for name, tensor in (("value", value), ("locations", locations), ("weights", weights)):
        if not tensor.is_floating_point() or tensor.device != value.device:
            raise UserError(f"{name} must be floats on {value.device}, got {tensor.dtype} on {tensor.device}")
