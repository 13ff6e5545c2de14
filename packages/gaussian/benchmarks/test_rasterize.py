"""Our backends beside dense evaluation in torch, eager and compiled, in the same run: one thread, processor time.

`extra_info` gets the seconds of ours and of every peer, their ratios, and by how much a call raised the resident size.
"""

import ctypes
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from smalti.gaussian import rasterize_gaussians_2d

Action = Callable[[], object]
# Gaussians, height, width, the greatest scale, and how many times faster than dense eager forward: tiles, numba.
SIZES = {
    "256 on 256x256": (256, 256, 256, 12.0, 20, 100),
    "1000 on 512x512": (1000, 512, 512, 12.0, 20, 300),
    "10000 on 768x512": (10000, 512, 768, 6.0, 20, 300),
}
# Dense tensors of so many numbers do not fit: what is measured is then some rows of the image, times how many fit.
MOST_NUMBERS = 1 << 26


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A ratio that does not depend on what else the machine does with its other cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=SIZES)
def size(request: pytest.FixtureRequest) -> tuple[int, int, int, float, int, int]:
    return SIZES[request.param]


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


def _seconds(action: Action) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def _peak_mb(action: Action) -> float:
    """Growth of the resident size at its highest during a call, in megabytes, at least 0.1; Linux only."""
    action()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    action()
    return max(_resident("VmHWM") - before, 100) / 1000


def _resident(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024 // 1000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # of the compiler's own
@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "forward_backward"])
def test_against_dense(
    benchmark: BenchmarkFixture, size: tuple[int, int, int, float, int, int], gradients: bool
) -> None:
    gaussians, height, width, largest, least_tiles, least_numba = size
    inputs = [value.requires_grad_(gradients) for value in _inputs(gaussians, largest)]
    rows = max(1, min(height, MOST_NUMBERS // (gaussians * width) // (4 if gradients else 1)))
    upstream = torch.linspace(-1, 1, 3 * height * width).view(1, 3, height, width)

    def action(draw: Callable[..., Tensor], *settings: int, **options: str) -> Action:
        def run() -> object:
            image = draw(*inputs, height, width, *settings, **options)
            return torch.autograd.grad(image, inputs, upstream[..., : image.shape[2], :]) if gradients else image

        return run

    ours = {name: action(rasterize_gaussians_2d, backend=name) for name in ("numba", "tiles")}
    dense = {"eager": action(_dense, rows), "compiled": action(torch.compile(_dense, dynamic=False), rows)}
    for run in (*ours.values(), *dense.values()):
        run()
    # In turn, so that a busy machine disturbs all alike; the least time of each counts.
    taken = [{name: _seconds(run) for name, run in (ours | dense).items()} for _ in range(3)]
    seconds = {name: min(times[name] for times in taken) for name in taken[0]}
    peaks = {name: _peak_mb(run) for name, run in (ours | dense).items()}
    for name in dense:
        seconds[name] *= height / rows
        peaks[name] *= height / rows
    info = benchmark.extra_info
    info["rows_of_dense"] = rows
    info["milliseconds"] = {name: 1e3 * value for name, value in seconds.items()}
    info["peak_mb"] = peaks
    for name in ours:
        for peer in dense:
            info[f"{peer}_over_{name}"] = seconds[peer] / seconds[name]
            info[f"memory_{peer}_over_{name}"] = peaks[peer] / peaks[name]
    benchmark.pedantic(ours["numba"], rounds=5)
    if not gradients:
        assert seconds["eager"] / seconds["tiles"] > least_tiles
        assert seconds["eager"] / seconds["numba"] > least_numba


@pytest.mark.slow
@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("backend", ["numba", "tiles"])
def test_time_grows_with_covered_pixels(benchmark: BenchmarkFixture, backend: str) -> None:
    """Sixteen times the pixels beside the same Gaussians cost little; sixteen times as many covered cost as much."""
    inputs = _inputs(1000, 12.0)
    away, wide = [inputs[0] / 4, *inputs[1:]], [inputs[0], 4 * inputs[1], *inputs[2:]]
    work = {
        "small": lambda: rasterize_gaussians_2d(*inputs, 256, 256, backend=backend),
        "large": lambda: rasterize_gaussians_2d(*away, 1024, 1024, backend=backend),
        "covered": lambda: rasterize_gaussians_2d(*wide, 1024, 1024, backend=backend),
    }
    for run in work.values():
        run()
    seconds = {name: min(_seconds(run) for _ in range(5)) for name, run in work.items()}
    benchmark.extra_info["seconds"] = seconds
    benchmark.pedantic(work["large"], rounds=3)
    assert seconds["large"] < 4 * seconds["small"]
    assert seconds["covered"] > 3 * seconds["large"] / 2
