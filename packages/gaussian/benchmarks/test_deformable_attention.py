"""Deformable attention without gradients on the CPU beside one `grid_sample` per level, in the same run."""

from __future__ import annotations

import pytest
import torch
from comparison import Comparison, Ours
from torch import Tensor

from smalti.gaussian.attention.deformable import multi_scale_deformable_attention
from smalti.gaussian.attention.torch_forms import sample_grids

pytestmark = pytest.mark.benchmark(group="Deformable attention")
# Images, heads, their width, points, queries, levels: GaussianToken's encoder, a detector's two and four levels.
SIZES = {
    "GaussianToken's": (8, 4, 16, 5, 1024, [(32, 32)]),
    "two levels": (4, 8, 32, 4, 1024, [(32, 32), (16, 16)]),
    "four levels": (2, 8, 32, 4, 900, [(64, 64), (32, 32), (16, 16), (8, 8)]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_without_gradients(compare: Comparison, name: str) -> None:
    images, heads, dim, points, queries, shapes = SIZES[name]
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(images, sum(h * w for h, w in shapes), heads, dim, generator=generator)
    locations = torch.rand(images, queries, heads, len(shapes), points, 2, generator=generator)
    weights = torch.rand(locations.shape[:-1], generator=generator)

    def ours() -> Tensor:
        return multi_scale_deformable_attention(value, shapes, locations, weights)

    def peer() -> Tensor:
        return sample_grids(value, shapes, locations, weights)

    torch.testing.assert_close(ours(), peer(), rtol=0, atol=2e-5)
    compare([Ours(f"{name}, without gradients", ours, bars={"grid_sample": 1.0})], {"grid_sample": peer}, rounds=9)
