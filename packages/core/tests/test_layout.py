import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from smalti.core.layout import TokenLayout

sizes = st.integers(1, 20)


@given(sizes, sizes, st.lists(st.integers(2, 2**18), min_size=1, max_size=4))
def test_counts_and_bits(height, width, vocab):
    layout = TokenLayout.grid(height, width, tuple(vocab))
    assert layout.positions == height * width
    assert layout.streams == len(vocab)
    assert layout.bits == pytest.approx(height * width * sum(map(math.log2, vocab)))
    assert TokenLayout.model_validate_json(layout.model_dump_json()) == layout


def test_scales_and_sequences():
    assert TokenLayout.scales(((1, 1), (2, 2), (4, 4)), (16,)).positions == 21
    assert TokenLayout.sequence(32, (4096,)).positions == 32
    assert str(TokenLayout.grid(8, 8, (512,))) == "grid 8x8, 1 stream of 512 codes"
    assert str(TokenLayout.sequence(32, (64, 64))) == "sequence 32, 2 streams of 64 codes"


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "grid", "shape": ((2, 2), (4, 4)), "vocab": (8,)},
        {"kind": "grid", "shape": ((4,),), "vocab": (8,)},
        {"kind": "sequence", "shape": ((0,),), "vocab": (8,)},
        {"kind": "scales", "shape": (), "vocab": (8,)},
        {"kind": "grid", "shape": ((2, 2),), "vocab": ()},
        {"kind": "grid", "shape": ((2, 2),), "vocab": (1,)},
        {"kind": "tree", "shape": ((2, 2),), "vocab": (8,)},
    ],
)
def test_impossible_layouts(values):
    with pytest.raises(ValidationError):
        TokenLayout.model_validate(values)
