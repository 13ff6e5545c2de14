"""Fixtures: the parity helper with its cases, and random Gaussians."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from smalti.core.testing.parity import read_case
from smalti.gaussian import rasterize_gaussians_2d

PARITY = Path(__file__).parent / "parity"
NAMES = ("means", "scales", "rotations", "features", "opacities")


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors gain nothing from more threads, and a shared machine loses by them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def load_case() -> Callable[[str], dict[str, Any]]:
    """Parity cases by name."""
    return lambda name: read_case(PARITY / f"{name}.json.gz")


@pytest.fixture(scope="session")
def random_gaussians() -> Callable[..., dict[str, Tensor]]:
    """Gaussians in float64: some centres lie outside the image, scales are in pixels."""

    def make(
        images: int = 1, gaussians: int = 5, channels: int = 3, seed: int = 0, *, largest_scale: float = 4.0
    ) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            sample = torch.rand(images, gaussians, *shape, generator=generator, dtype=torch.float64)
            return low + (high - low) * sample

        return {
            "means": uniform(-1.5, 1.5, 2),
            "scales": uniform(0.1, largest_scale, 2),
            "rotations": uniform(-4, 4),
            "features": uniform(-2, 2, channels),
            "opacities": uniform(0, 1),
        }

    return make


@pytest.fixture(scope="session")
def render_with_gradients() -> Callable[..., dict[str, Tensor]]:
    """The image and the gradients of sum(image × upstream), by name."""

    def render(
        gaussians: dict[str, Tensor], height: int, width: int, upstream: Tensor | None = None, **settings: Any
    ) -> dict[str, Tensor]:
        leaves = [gaussians[name].detach().clone().requires_grad_() for name in NAMES]
        image = rasterize_gaussians_2d(*leaves, height, width, **settings)
        if upstream is None:
            generator = torch.Generator().manual_seed(7)
            upstream = torch.randn(image.shape, generator=generator, dtype=torch.float64)
        gradients = torch.autograd.grad(image, leaves, upstream.to(image.dtype))
        return {"image": image.detach(), **dict(zip(NAMES, gradients, strict=True))}

    return render
