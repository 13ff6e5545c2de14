"""Our backends beside dense evaluation in torch, eager and compiled, in the same run: one thread, processor time."""

from collections.abc import Callable

import pytest
import torch
from comparison import Comparison, Ours
from torch import Tensor

from smalti.gaussian import rasterize_gaussians_2d

Action = Callable[[], object]
pytestmark = pytest.mark.benchmark(group="Rasterizer")
# Gaussians, height, width, the greatest scale, and how many times faster than dense eager forward: tiles, numba.
SIZES = {
    "256 Gaussians on 256 x 256": (256, 256, 256, 12.0, 20, 100),
    "1,000 on 512 x 512": (1000, 512, 512, 12.0, 20, 300),
    "10,000 on 768 x 512": (10000, 512, 768, 6.0, 20, 300),
}
# Dense tensors of more numbers take minutes and do not fit: then some rows of the image are measured, times how many
# there are. Where that is less than a sixteenth of the image, the peer is not compiled: it would take minutes, too.
MOST_NUMBERS = 1 << 24
MEMORY_BAR = 100.0


def _inputs(gaussians: int, largest: float) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(1, gaussians, *shape, generator=generator)

    scales = 0.3 + (largest - 0.3) * uniform(2)
    return [2 * uniform(2) - 1, scales, torch.pi * uniform(), uniform(3), uniform()]


def _dense(
    means: Tensor,
    scales: Tensor,
    rotations: Tensor,
    features: Tensor,
    opacities: Tensor,
    height: int,
    width: int,
    rows: int,
) -> Tensor:
    """The formula as one would write it down, without culling and thresholds: the first rows of the image."""
    x, y = (0.5 * (means + 1) * means.new_tensor((width, height)))[..., None, None].unbind(-3)
    dx = x - torch.arange(width, dtype=means.dtype)
    dy = y - torch.arange(rows, dtype=means.dtype)[:, None]
    sx, sy = scales[..., None, None].unbind(-3)
    cos, sin = (t[..., None, None] for t in (rotations.cos(), rotations.sin()))
    xx, xy, yy = (cos * sx) ** 2 + (sin * sy) ** 2, cos * sin * (sy**2 - sx**2), (sin * sx) ** 2 + (cos * sy) ** 2
    sigma = (0.5 * (yy * dx**2 + xx * dy**2) - xy * dx * dy) / (xx * yy - xy**2)
    alpha = (opacities[..., None, None] * torch.exp(-sigma)).clamp(max=1)
    return torch.einsum("bnc,bnhw->bchw", features, alpha)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # of the compiler's own
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "forward_backward"])
@pytest.mark.parametrize("size", SIZES)
def test_against_dense(compare: Comparison, size: str, gradients: bool) -> None:
    gaussians, height, width, largest, least_tiles, least_numba = SIZES[size]
    inputs = [value.requires_grad_(gradients) for value in _inputs(gaussians, largest)]
    rows = max(1, min(height, MOST_NUMBERS // (gaussians * width) // (4 if gradients else 1)))
    upstream = torch.linspace(-1, 1, 3 * height * width).view(1, 3, height, width)

    def action(draw: Callable[..., Tensor], *settings: int, **options: str) -> Action:
        def run() -> object:
            image = draw(*inputs, height, width, *settings, **options)
            return torch.autograd.grad(image, inputs, upstream[..., : image.shape[2], :]) if gradients else image

        return run

    peers = {"dense, eager": action(_dense, rows)}
    if 16 * rows >= height:
        peers["dense, compiled"] = action(torch.compile(_dense, dynamic=False), rows)
    ours = [
        Ours(
            f"{name}, {size}, {'forward and backward' if gradients else 'forward'}",
            action(rasterize_gaussians_2d, backend=name),
            bars={} if gradients else {"dense, eager": least},
            memory_bars={"dense, eager": MEMORY_BAR},
        )
        for name, least in (("numba", least_numba), ("tiles", least_tiles))
    ]
    for run in (*(one.action for one in ours), *peers.values()):
        run()
    compare(ours, peers, rounds=5, peer_scale=height / rows, memory_rounds=3)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["numba", "tiles"])
def test_time_grows_with_covered_pixels(compare: Comparison, backend: str) -> None:
    """Sixteen times the pixels beside the same Gaussians cost little; sixteen times as many covered cost as much."""
    inputs = _inputs(1000, 12.0)
    away, wide = [inputs[0] / 4, *inputs[1:]], [inputs[0], 4 * inputs[1], *inputs[2:]]

    def large() -> Tensor:
        return rasterize_gaussians_2d(*away, 1024, 1024, backend=backend)

    peers = {
        "the same Gaussians on 256 x 256": lambda: rasterize_gaussians_2d(*inputs, 256, 256, backend=backend),
        "16 times as many pixels covered": lambda: rasterize_gaussians_2d(*wide, 1024, 1024, backend=backend),
    }
    for run in (large, *peers.values()):
        run()
    bars = dict(zip(peers, (0.25, 1.5), strict=True))
    compare([Ours(f"{backend}, 1,000 Gaussians on 1024 x 1024", large, bars=bars)], peers)
