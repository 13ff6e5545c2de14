"""The Triton kernels on a GPU: beside plain torch there, and beside the floor by arithmetic and by memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from comparison import Comparison, Ours
from torch import Tensor

from smalti.gaussian import rasterize_gaussians_2d
from smalti.gaussian.attention.deformable import multi_scale_deformable_attention
from smalti.gaussian.attention.torch_forms import sample_grids

pytestmark = [pytest.mark.gpu, pytest.mark.benchmark(group="Triton kernels")]
Work = Callable[[], object]


def _differentiated(function: Callable[..., Tensor], inputs: list[Tensor], *, backward: bool) -> Work:
    """A call of the function, with the gradients to all inputs where asked."""
    if not backward:
        return lambda: function(*inputs)
    leaves = [x.clone().requires_grad_() for x in inputs]
    upstream = torch.randn_like(function(*inputs))
    return lambda: torch.autograd.grad(function(*leaves), leaves, upstream)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
@pytest.mark.parametrize(
    ("count", "height", "width", "channels", "images"),
    [(256, 256, 256, 3, 1), (1000, 512, 512, 3, 1), (10_000, 512, 768, 3, 1), (256, 32, 32, 8, 64)],
)
def test_rasterizer(
    compare: Comparison, count: int, height: int, width: int, channels: int, images: int, backward: bool
) -> None:
    """One covered pixel of a Gaussian takes about 12 + 2 C operations of arithmetic, and as many again twice over."""
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(images, count, *shape, generator=generator)

    made = [2 * uniform(2) - 1, 0.3 + 5.7 * uniform(2), torch.pi * uniform(), uniform(channels), uniform()]
    inputs = [x.cuda() for x in made]

    def by(backend: str) -> Work:
        def draw(*values: Tensor) -> Tensor:
            return rasterize_gaussians_2d(*values, height, width, backend=backend)

        return _differentiated(draw, inputs, backward=backward)

    peers = {"tiles": by("tiles")}
    if count * height * width * images <= 1 << 29:
        peers["dense"] = by("reference")
    # Pixels within the threshold: an ellipse of that many standard deviations.
    scales, opacities = made[1], made[4]
    covered = (2 * torch.pi * scales.prod(-1) * (255 * opacities).clamp(min=1).log()).sum().item()
    operations = covered * (12 + 2 * channels) * (3 if backward else 1)
    numbers = images * channels * height * width * (2 if backward else 1) + sum(x.numel() for x in inputs)
    what = f"rasterizer, {images} x {count} on {width} x {height}, {'forward and backward' if backward else 'forward'}"
    floors = {"TFLOP": operations / 1e12, "GB": 4 * numbers / 1e9}
    compare([Ours(what, by("triton"), amounts=floors)], peers, rounds=20, memory_rounds=3)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
@pytest.mark.parametrize(
    ("images", "queries", "heads", "dim", "points", "shapes"),
    [
        (8, 1024, 4, 16, 5, [(32, 32)]),
        (4, 1024, 8, 32, 4, [(32, 32), (16, 16)]),
        (2, 900, 8, 32, 4, [(64, 64), (32, 32), (16, 16), (8, 8)]),
    ],
    ids=["gaussiantoken", "two-levels", "four-levels"],
)
def test_deformable_attention(
    compare: Comparison,
    images: int,
    queries: int,
    heads: int,
    dim: int,
    points: int,
    shapes: list[tuple[int, int]],
    backward: bool,
) -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(images, sum(h * w for h, w in shapes), heads, dim, generator=generator).cuda()
    locations = torch.rand(images, queries, heads, len(shapes), points, 2, generator=generator).cuda()
    weights = torch.rand(locations.shape[:-1], generator=generator).cuda()
    inputs = [value, locations, weights]

    def by(form: Callable[..., Tensor]) -> Work:
        return _differentiated(lambda value, *others: form(value, shapes, *others), inputs, backward=backward)

    numbers = sum(x.numel() for x in inputs) * (2 if backward else 1) + images * queries * heads * dim
    amounts = {"GB": 4 * numbers / 1e9, "GB gathered": 4 * 4 * weights.numel() * dim / 1e9}
    what = f"attention, {len(shapes)} levels, {'forward and backward' if backward else 'forward'}"
    ours = Ours(what, by(multi_scale_deformable_attention), amounts=amounts)
    compare([ours], {"grid_sample": by(sample_grids)}, rounds=20, memory_rounds=3)
