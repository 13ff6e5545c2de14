"""The convolutional decoder of latent tokens."""

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F
from torch.testing import assert_close

from smalti.core.backbones.token_cnn import TokenCNNDecoderOptions
from smalti.core.errors import UserError

SMALL = {"width": 8, "tokens": 5, "grid": (2, 3), "channels": 32, "multipliers": (1, 2), "blocks": 1}


def decoder(**changes):
    torch.manual_seed(0)
    return TokenCNNDecoderOptions(**{**SMALL, **changes}).build(3).eval()


def test_only_the_middle_column_of_the_first_kernel_acts():
    """Over a sequence, a 3 x 3 convolution with zeros around is a convolution of three neighbours."""
    model = decoder(multipliers=(1,), attention_levels=())
    latent = torch.randn(2, 5, 8)
    sequence = model.embedding(model.mask.expand(2, 6, -1), latent).transpose(1, 2)
    kernel = model.cnn.conv_in.weight[..., 1]
    x = F.conv1d(sequence, kernel, model.cnn.conv_in.bias, padding=1).unsqueeze(-1)
    x = model.cnn.middle(x)[:, :, 1:7, 0].reshape(2, 32, 2, 3)
    for level in model.cnn.levels:
        x = level(x)
    assert_close(model(latent), model.cnn.head(x))


def test_images_of_any_grid():
    assert decoder()(torch.randn(2, 5, 8)).shape == (2, 3, 4, 6)
    assert decoder(multipliers=(1, 1, 2, 2, 4), grid=(1, 2))(torch.randn(1, 5, 8)).shape == (1, 3, 16, 32)


def test_every_weight_learns_from_every_token():
    model = decoder()
    latent = torch.randn(2, 5, 8, requires_grad=True)
    model(latent).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert bool((latent.grad.abs().sum(-1) > 0).all())


def test_samples_do_not_see_each_other():
    model, latent = decoder(), torch.randn(3, 5, 8)
    with torch.no_grad():
        assert_close(model(latent)[1:2], model(latent[1:2]))


def test_a_prefix_of_the_tokens():
    assert decoder()(torch.randn(1, 2, 8)).shape == (1, 3, 4, 6)


def test_wrong_latents():
    with pytest.raises(UserError, match=r"^the token-cnn decoder takes a latent \(B, N, 8\), got \(2, 5, 9\)$"):
        decoder()(torch.randn(2, 5, 9))
    with pytest.raises(UserError, match=r"^6 latent tokens do not fit: there are 5 positions$"):
        decoder()(torch.randn(2, 6, 8))


def test_options_of_the_convolutions_are_checked():
    with pytest.raises(ValidationError, match="width 20 cannot be divided into 32 normalisation groups"):
        decoder(channels=20)


def test_bfloat16_and_one_graph():
    model, latent = decoder(), torch.randn(2, 5, 8)
    with torch.no_grad():
        plain = model(latent)
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(model(latent).float(), plain, rtol=0.1, atol=0.1)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_close(compiled(latent), plain)
