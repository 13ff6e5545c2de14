import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "toy"))

from toy_components import SignsOptions, TableOptions

from smalti.core.backbones.cnn import CNNDecoderOptions, CNNEncoderOptions
from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout
from smalti.core.options import Preprocessing
from smalti.core.sampling_settings import SamplingSettings
from smalti.core.testing import GeneratorContract, QuantizerContract, TokenizerContract
from smalti.core.tokenizer import ComposedOptions


def composed(**changes):
    return ComposedOptions(
        preprocessing=changes.pop("preprocessing", Preprocessing(image_size=16, channels=3)),
        encoder=CNNEncoderOptions(widths=(8, 12), blocks=1, groups=4),
        quantizer=SignsOptions(dim=5),
        decoder=CNNDecoderOptions(widths=(8, 12), blocks=1, groups=4),
        **changes,
    )


class TestComposed(TokenizerContract):
    options = composed()


class TestGrey(TokenizerContract):
    options = composed(preprocessing=Preprocessing(image_size=8, channels=1, fit="pad"))


class TestToyQuantizer(QuantizerContract):
    options = SignsOptions()


class TestToyGenerator(GeneratorContract):
    options = TableOptions()
    unsupported = TokenLayout.grid(2, 2, (4, 4))


@pytest.mark.parametrize(
    ("layout", "steps"),
    [
        (TokenLayout.grid(2, 2, (4,)), [0, 1, 2, 3]),
        (TokenLayout.scales(((1, 1), (1, 2), (2, 2)), (4,)), [0, 1, 1, 2, 2, 2, 2]),
    ],
    ids=str,
)
def test_by_default_positions_or_scales_come_one_after_the_other(layout, steps):
    _, found = TableOptions().build(layout, 3).sample_traced(torch.arange(3), SamplingSettings())
    assert found.tolist() == [steps] * 3


def test_layout_follows_the_image():
    tokenizer = composed().build().eval()
    assert tokenizer.layout() == TokenLayout.grid(4, 4, (32,))
    assert tokenizer.layout((16, 24)) == TokenLayout.grid(4, 6, (32,))
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    tokens = tokenizer.encode(images)
    assert tokens.shape == (2, 24, 1)
    assert tokenizer.decode(tokens, tokenizer.layout((16, 24))).shape == images.shape


def test_sizes_that_cannot_be_taken():
    with pytest.raises(UserError, match="an image of 18x18 cannot be encoded: both sides must be multiples of 4"):
        composed(preprocessing=Preprocessing(image_size=18)).build()
    with pytest.raises(UserError, match="16x10 cannot be encoded"):
        composed().build().encode(torch.zeros(1, 3, 16, 10))
    with pytest.raises(UserError, match=r"takes a latent \(B, h, w, 12\), got \(1, 4, 4, 5\)"):
        composed().build().decoder(torch.zeros(1, 4, 4, 5))


def test_widths_and_groups_must_agree():
    with pytest.raises(ValueError, match="width 10 cannot be divided into 4 normalisation groups"):
        CNNEncoderOptions(widths=(8, 10), groups=4)
