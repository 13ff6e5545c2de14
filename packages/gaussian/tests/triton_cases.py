"""Run by test_triton.py in a process of its own: the kernels against the references, in values and gradients."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from smalti.gaussian import rasterize_gaussians_2d
from smalti.gaussian.attention import deformable as deformable_attention
from smalti.gaussian.attention.torch_forms import sample_grids
from smalti.gaussian.attention.triton_kernels import _sample, sample_fused

# float32 leaves the gradients of wide ellipses few digits, and one pixel in thousands at a threshold may flip.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-10}
Shapes = list[tuple[int, int]]


def compare(
    name: str, ours: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: list[Tensor]
) -> list[Tensor]:
    """Check output and gradients by their norm; gives ours."""
    leaves = [x.requires_grad_() for x in inputs]
    results = []
    for function in (ours, reference):
        output = function(*leaves)
        upstream = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).cos()
        gradients = torch.autograd.grad(output, leaves, upstream.view(output.shape), materialize_grads=True)
        results.append([output.detach(), *gradients])
    for number, (got, expected) in enumerate(zip(*results, strict=True)):
        assert got.shape == expected.shape, (name, number)
        error, size = (got - expected).norm().item(), expected.norm().item()
        assert error <= TOLERANCE[got.dtype] * size, f"{name}, result {number}: off by {error:.3g} of {size:.3g}"
    return results[0]


def gaussians(images: int, count: int, channels: int, dtype: torch.dtype, device: str, largest: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(images, count, *shape, generator=generator, dtype=torch.float64)

    made = [uniform(-1.2, 1.2, 2), uniform(0.1, largest, 2), uniform(-4, 4), uniform(-2, 2, channels), uniform(0, 1.5)]
    if count > 3:
        made[1][:, 0] = 0
        made[4][:, 1] = 0
        made[0][:, 2] = 40
    return [x.to(device, dtype) for x in made]


def check_rasterizer(
    size: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    device: str,
    compositing: str,
    largest: float,
    *,
    cut: bool,
) -> None:
    images, count, channels, height, width = size
    settings = {} if cut else {"min_alpha": 0.0, "cull_sigmas": math.inf, "pixel_center": 0.5}

    def by(backend: str) -> Callable[..., Tensor]:
        return lambda *inputs: rasterize_gaussians_2d(
            *inputs, height, width, compositing=compositing, backend=backend, **settings
        )

    name = f"rasterizer {size} {dtype} {compositing} {settings}"
    inputs = gaussians(images, count, channels, dtype, device, largest)
    first = compare(name, by("triton"), by("reference"), inputs)
    again = torch.autograd.grad((by("triton")(*inputs) * first[0].cos()).sum(), inputs)
    twice = torch.autograd.grad((by("triton")(*inputs) * first[0].cos()).sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(again, twice, strict=True)), name


def attention(
    size: tuple[int, int, int, int, int], shapes: Shapes, dtype: torch.dtype, device: str, reach: float = 0.2
) -> list[Tensor]:
    batch, queries, heads, dim, points = size
    generator = torch.Generator().manual_seed(queries)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    positions = sum(height * width for height, width in shapes)
    value = uniform(batch, positions, heads, dim) - 0.5
    locations = (1 + 2 * reach) * uniform(batch, queries, heads, len(shapes), points, 2) - reach
    return [x.to(device, dtype) for x in (value, locations, uniform(*locations.shape[:-1]))]


def check_attention(size: tuple[int, int, int, int, int], shapes: Shapes, dtype: torch.dtype, device: str) -> None:
    inputs = attention(size, shapes, dtype, device)
    if inputs[1].numel() > 4:
        inputs[1].view(-1)[:4] = torch.tensor([math.nan, math.inf, 1e30, 0.5])
    compare(
        f"attention {size} {shapes} {dtype}",
        lambda value, *others: sample_fused(value, shapes, *others),
        lambda value, *others: sample_grids(value, shapes, *others),
        inputs,
    )


def check_operator(device: str) -> None:
    """The operator is whole for PyTorch, and torch.compile captures the public function with it."""
    value, locations, weights = (
        x.requires_grad_() for x in attention((1, 1, 2, 2, 1), [(2, 2)], torch.float32, device)
    )

    def everywhere(device: str) -> bool:
        return True

    torch.library.opcheck(_sample, (value, [2, 2], locations, weights))
    with mock.patch.object(deformable_attention, "_has_kernels", everywhere):
        function = deformable_attention.multi_scale_deformable_attention
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        output = compiled(value, [(2, 2)], locations, weights)
        assert torch.equal(output, function(value, [(2, 2)], locations, weights))
        output.sum().backward()
    expected = torch.autograd.grad(sample_grids(value, [(2, 2)], locations, weights).sum(), value)
    torch.testing.assert_close(value.grad, *expected)


def main() -> None:
    double = torch.float64
    for size in ((2, 6, 3, 20, 37), (1, 5, 1, 1, 1), (1, 4, 64, 33, 17), (1, 0, 3, 5, 20)):
        check_rasterizer(size, double, "cpu", "sum", 4.0, cut=True)
    check_rasterizer((1, 5, 8, 16, 32), torch.float32, "cpu", "sum", 4.0, cut=False)
    check_rasterizer((1, 9, 3, 17, 18), double, "cpu", "over", 9.0, cut=True)
    check_rasterizer((1, 5, 20, 18, 16), torch.float32, "cpu", "over", 9.0, cut=False)
    check_attention((2, 3, 2, 3, 2), [(1, 5), (3, 1), (1, 1)], double, "cpu")
    check_attention((1, 4, 2, 16, 2), [(4, 6), (2, 3)], torch.float32, "cpu")
    check_attention((1, 300, 1, 1, 1), [(3, 2)], double, "cpu")
    check_attention((1, 0, 1, 2, 1), [(3, 2)], double, "cpu")
    check_operator("cpu")


if __name__ == "__main__":
    main()
    print("all equal", file=sys.stdout)
