"""The contract of generators, over everything this package registers."""

from __future__ import annotations

from smalti.core.layout import TokenLayout
from smalti.core.testing import GeneratorContract
from smalti.generation.ar import AROptions


class TestAROnAGrid(GeneratorContract):
    options = AROptions(layers=2, dim=32, heads=4, ffn_multiple=8)
    unsupported = TokenLayout.scales(((1, 1), (2, 2)), (16,))


class TestAROnASequence(GeneratorContract):
    options = AROptions(layers=2, dim=32, heads=2, ffn_multiple=8, drop_path=0.1)
    layout = TokenLayout.sequence(10, (24,))
    unsupported = TokenLayout.sequence(10, (24, 24))
