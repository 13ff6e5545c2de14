"""The contract of generators, over everything this package registers."""

from __future__ import annotations

import pytest
import torch

from smalti.core.layout import TokenLayout
from smalti.core.testing import GeneratorContract
from smalti.generation.ar import AROptions
from smalti.generation.far import FAROptions
from smalti.generation.maskgit import MaskGITOptions
from smalti.generation.rar import RAROptions

SMALL = {"layers": 2, "dim": 32, "heads": 4, "ffn_multiple": 8}


class TestAROnAGrid(GeneratorContract):
    options = AROptions(**SMALL)
    unsupported = TokenLayout.scales(((1, 1), (2, 2)), (16,))


class TestAROnASequence(GeneratorContract):
    options = AROptions(**{**SMALL, "heads": 2}, drop_path=0.1)
    layout = TokenLayout.sequence(10, (24,))
    unsupported = TokenLayout.sequence(10, (24, 24))


class TestAROfSeveralStreams(GeneratorContract):
    options = AROptions(**SMALL, flatten=True)
    layout = TokenLayout.grid(2, 3, (16, 5))


class TestARModulated(GeneratorContract):
    options = AROptions(**SMALL, modulation=True)


class TestARAsMinGPT(GeneratorContract):
    options = AROptions(**SMALL, blocks="gpt")


class TestFAR(GeneratorContract):
    options = FAROptions(**SMALL, inner_layers=1)
    layout = TokenLayout.grid(2, 3, (16, 5))
    unsupported = TokenLayout.grid(2, 3, (16,))


class TestFAROfGaussians(GeneratorContract):
    options = FAROptions(**SMALL, inner_layers=1, aggregation="sum", objective="sum")
    layout = TokenLayout.sequence(5, (32, 8, 8, 8, 8, 8))


PLAIN = {"layers": 2, "dim": 32, "heads": 4, "ffn_dim": 64}


class TestRAR(GeneratorContract):
    options = RAROptions(**PLAIN)
    unsupported = TokenLayout.scales(((1, 1), (2, 2)), (16,))


class TestRAROfSeveralStreams(GeneratorContract):
    options = RAROptions(**PLAIN, flatten=True)
    layout = TokenLayout.sequence(5, (16, 5))


class TestMaskGIT(GeneratorContract):
    options = MaskGITOptions(**PLAIN)
    unsupported = TokenLayout.grid(2, 3, (16, 5))


class TestMaskGITAsUViT(GeneratorContract):
    options = MaskGITOptions(**PLAIN, form="uvit", norm_eps=1e-5, schedule="cosine")
    layout = TokenLayout.sequence(10, (24,))
    unsupported = TokenLayout.scales(((1, 1), (2, 2)), (16,))


class TestMaskGITOfSeveralStreams(GeneratorContract):
    options = MaskGITOptions(**PLAIN, flatten=True)
    layout = TokenLayout.grid(2, 3, (16, 5))


@pytest.mark.parametrize(
    "kind", [TestAROfSeveralStreams, TestFAR, TestRAR, TestMaskGIT], ids=lambda kind: kind.__name__
)
def test_no_samples(kind: type[GeneratorContract]) -> None:
    contract = kind()
    tokens = contract.build().sample(torch.zeros(0, dtype=torch.int64), contract.settings())
    assert tokens.shape == (0, kind.layout.positions, kind.layout.streams)
