"""The Triton kernels on a GPU: beside plain torch there, and beside the floor by arithmetic and by memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from smalti.gaussian import rasterize_gaussians_2d
from smalti.gaussian.attention.deformable import multi_scale_deformable_attention
from smalti.gaussian.attention.torch_forms import sample_grids

Work = Callable[[], object]


def _differentiated(function: Callable[..., Tensor], inputs: list[Tensor], *, backward: bool) -> Work:
    """A call of the function, with the gradients to all inputs where asked."""
    if not backward:
        return lambda: function(*inputs)
    leaves = [x.clone().requires_grad_() for x in inputs]
    upstream = torch.randn_like(function(*inputs))
    return lambda: torch.autograd.grad(function(*leaves), leaves, upstream)


def _seconds(action: Work) -> float:
    """Of the device, between two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    action()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def _compare(benchmark: BenchmarkFixture, ours: Work, peers: dict[str, Work]) -> float:
    """Time in turn, the least of each; the ratios go to `extra_info`, our seconds are the result."""
    actions = {"ours": ours, **peers}
    least = {name: min(_seconds(action) for _ in range(3)) for name, action in actions.items()}
    for _ in range(20):
        least = {name: min(least[name], _seconds(action)) for name, action in actions.items()}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ours()
    info = benchmark.extra_info
    info["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6
    info["device"], info["milliseconds"] = torch.cuda.get_device_name(), 1000 * least["ours"]
    info |= {f"ratio_{name}": least[name] / least["ours"] for name in peers}
    benchmark.pedantic(_seconds, (ours,), rounds=20)
    return least["ours"]


@pytest.mark.gpu
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
@pytest.mark.parametrize(
    ("count", "height", "width", "channels", "images"),
    [(256, 256, 256, 3, 1), (1000, 512, 512, 3, 1), (10_000, 512, 768, 3, 1), (256, 32, 32, 8, 64)],
)
def test_rasterizer(
    benchmark: BenchmarkFixture, count: int, height: int, width: int, channels: int, images: int, backward: bool
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
    seconds = _compare(benchmark, by("triton"), peers)
    # Pixels within the threshold: an ellipse of that many standard deviations.
    scales, opacities = made[1], made[4]
    covered = (2 * torch.pi * scales.prod(-1) * (255 * opacities).clamp(min=1).log()).sum().item()
    operations = covered * (12 + 2 * channels) * (3 if backward else 1)
    benchmark.extra_info["teraflops"] = operations / seconds / 1e12
    numbers = images * channels * height * width * (2 if backward else 1) + sum(x.numel() for x in inputs)
    benchmark.extra_info["gigabytes_per_second"] = 4 * numbers / seconds / 1e9


@pytest.mark.gpu
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
    benchmark: BenchmarkFixture,
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

    seconds = _compare(benchmark, by(multi_scale_deformable_attention), {"grid_sample": by(sample_grids)})
    numbers = sum(x.numel() for x in inputs) * (2 if backward else 1) + images * queries * heads * dim
    benchmark.extra_info["gigabytes_per_second"] = 4 * numbers / seconds / 1e9
    benchmark.extra_info["gathered_gigabytes_per_second"] = 4 * 4 * weights.numel() * dim / seconds / 1e9
