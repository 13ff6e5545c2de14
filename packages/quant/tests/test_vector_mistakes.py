"""What vector quantization says to wrong inputs and options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from smalti.core.errors import UserError
from smalti.quant.vector import VectorQuantizer, VectorQuantizerOptions

Build = Callable[..., VectorQuantizer]


@pytest.mark.parametrize(
    ("latent", "sentence"),
    [
        (torch.zeros(2, 9, 5), "got torch.float32 (2, 9, 5)"),
        (torch.zeros(2, 3, 3, 4, dtype=torch.int64), "got torch.int64 (2, 3, 3, 4)"),
        (torch.zeros(9, 4), "got torch.float32 (9, 4)"),
    ],
)
def test_wrong_latents_are_told(build_vq: Build, latent: Tensor, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        build_vq()(latent)
    assert str(error.value) == f"the latent must be float (B, L, 4) or (B, h, w, 4), {sentence}"


def test_an_empty_training_batch_is_told(build_vq: Build) -> None:
    with pytest.raises(UserError) as error:
        build_vq().train()(torch.zeros(0, 9, 4))
    assert str(error.value) == "a training batch needs at least one token, got a latent of (0, 9, 4)"


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        (torch.full((1, 9, 1), 16), "token 16 of stream 0 is out of range: there are 16 codes, 0 to 15"),
        (torch.full((1, 9, 1), -1), "token -1 of stream 0 is out of range: there are 16 codes, 0 to 15"),
        (torch.zeros(1, 9, dtype=torch.int64), "tokens must be int64 (B, L, 1), got torch.int64 (1, 9)"),
        (torch.zeros(1, 9, 2, dtype=torch.int64), "tokens must be int64 (B, L, 1), got torch.int64 (1, 9, 2)"),
        (torch.zeros(1, 9, 1), "tokens must be int64 (B, L, 1), got torch.float32 (1, 9, 1)"),
        (torch.zeros(1, 8, 1, dtype=torch.int64), "tokens of a latent space (3, 3) have 9 positions, got 8"),
    ],
)
def test_wrong_tokens_are_told(build_vq: Build, tokens: Tensor, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        build_vq().decode(tokens, (3, 3))
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("option", "value"),
    [("codebook_size", 1), ("dim", 0), ("ema_decay", 1.0), ("revive_after", 0), ("commitment_weight", -1.0)],
)
def test_wrong_options_are_told(option: str, value: float) -> None:
    with pytest.raises(ValidationError) as error:
        VectorQuantizerOptions(**{"dim": 4, "codebook_size": 8, option: value})
    assert [line["loc"] for line in error.value.errors()] == [(option,)]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"unit_length": "codes"}, "unit_length 'codes' needs cosine: true"),
        ({"affine": True, "cosine": True}, "an affine codebook has no unit length: choose affine or cosine"),
        (
            {"revive_below": 2},
            "revive_below needs update: ema, whose counts it looks at, and no revive_after",
        ),
        ({"revive_after": 2, "update": "none"}, "revive_after changes codes that update: none keeps"),
        (
            {"orthogonal_weight": 1, "update": "ema"},
            "orthogonal_weight needs update: loss, nothing else follows its gradient",
        ),
        ({"estimator": "gumbel"}, "the estimator gumbel needs a stochastic_temperature"),
    ],
)
def test_options_that_contradict_each_other_are_told(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError) as error:
        VectorQuantizerOptions(dim=4, codebook_size=8, **options)
    assert [line["msg"] for line in error.value.errors()] == [f"Value error, {sentence}"]
