import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent / "toy"))

from toy_components import SignsOptions

from smalti.core.backbones.cnn import CNNDecoderOptions
from smalti.core.backbones.patches import PatchPixels
from smalti.core.backbones.titok import LogitsHeadOptions, TiTokDecoderOptions, TiTokEncoderOptions, reread
from smalti.core.backbones.vit_vqgan import ViTVQGANDecoderOptions, ViTVQGANEncoderOptions
from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout
from smalti.core.options import Preprocessing
from smalti.core.testing import TokenizerContract
from smalti.core.tokenizer import ComposedOptions

TINY = {"width": 24, "layers": 2, "heads": 2, "grid": (4, 4), "tokens": 8}
HEAD = {"name": "pixels", "patch": 4}
GRID = {"width": 24, "layers": 2, "heads": 2, "patch": 4, "grid": (4, 4)}
PROXY = {"name": "proxy", "codes": 16, "decoder": CNNDecoderOptions(widths=(8, 8), blocks=1)}


def composed(encoder, decoder, **projections):
    parts = {"encoder": encoder, "quantizer": SignsOptions(dim=6), "decoder": decoder}
    return ComposedOptions(preprocessing=Preprocessing(image_size=16), **parts, **projections)


class TestPixels(TokenizerContract):
    options = composed(
        TiTokEncoderOptions(**TINY, patch=4, image_range="unit"),
        TiTokDecoderOptions(**TINY, head=HEAD | {"image_range": "unit"}),
    )


class TestProxyCodes(TokenizerContract):
    options = composed(TiTokEncoderOptions(**TINY, patch=4, reread=True), TiTokDecoderOptions(**TINY, head=PROXY))


class TestWithoutClassToken(TokenizerContract):
    options = composed(
        TiTokEncoderOptions(**TINY, patch=4, class_token="none", latent_positions=False, qkv_bias=False),
        TiTokDecoderOptions(**TINY, head=HEAD, class_token="none", qkv_bias=False),
    )


class TestViTVQGAN(TokenizerContract):
    options = composed(ViTVQGANEncoderOptions(**GRID), ViTVQGANDecoderOptions(**GRID))


@settings(deadline=None, max_examples=20)
@given(batch=st.integers(1, 3), count=st.integers(1, 7), width=st.integers(1, 7))
def test_reread_moves_no_number(batch, count, width):
    tokens = torch.arange(batch * count * width).view(batch, count, width)
    mixed = reread(tokens)
    for image in range(batch):
        flat = tokens[image].flatten()
        for token in range(count):
            assert mixed[image, token].tolist() == [flat[channel * count + token] for channel in range(width)]


def test_reread_is_the_identity_of_one_token_only():
    assert torch.equal(reread(torch.arange(5).view(1, 1, 5)), torch.arange(5).view(1, 1, 5))
    assert not torch.equal(reread(torch.arange(6).view(1, 2, 3)), torch.arange(6).view(1, 2, 3))


def randomised(module):
    """Weights of ordinary size, so that no part hides behind a start near zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(std=0.3, generator=generator)
    return module.double().eval()


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()


def twin_blocks(sequence, x, heads):
    """Norm, blocks and norm in so many words."""
    x = F.layer_norm(x, x.shape[-1:], sequence.norm_pre.weight, sequence.norm_pre.bias)
    for block in sequence.blocks:
        normed = F.layer_norm(x, x.shape[-1:], block.norm1.weight, block.norm1.bias)
        query, key, value = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in block.attention.qkv(normed).chunk(3, -1)
        )
        shares = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
        x = x + block.attention.out((shares @ value).transpose(1, 2).flatten(2))
        hidden = block.mlp[0](F.layer_norm(x, x.shape[-1:], block.norm2.weight, block.norm2.bias))
        x = x + block.mlp[2](hidden * (1 + torch.erf(hidden / 2**0.5)) / 2)
    return F.layer_norm(x, x.shape[-1:], sequence.norm_post.weight, sequence.norm_post.bias)


@pytest.mark.parametrize("image_range", ["symmetric", "unit"])
@pytest.mark.parametrize("grid", [(4, 4), (2, 3)])
def test_encoder_equals_its_twin(image_range, grid):
    encoder = randomised(TiTokEncoderOptions(**TINY | {"patch": 4, "grid": grid}, image_range=image_range).build(3))
    images = random(2, 3, 4 * grid[0], 4 * grid[1])
    given_images = (images + 1) / 2 if image_range == "unit" else images
    projection, embedding = encoder.patches.projection, encoder.sequence.embedding
    rows = []
    for row in range(grid[0]):
        for column in range(grid[1]):
            patch = given_images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten(1)
            rows.append(patch @ projection.weight.flatten(1).T + projection.bias)
    front = torch.cat([embedding.class_token.expand(2, 1, -1), torch.stack(rows, 1)], 1) + embedding.grid_positions
    latents = (encoder.latents + embedding.latent_positions).expand(2, -1, -1)
    expected = twin_blocks(encoder.sequence, torch.cat([front, latents], 1), 2)[:, -8:]
    found = encoder(images)
    assert encoder.latent_space((4 * grid[0], 4 * grid[1])) == (8,)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), images)[0] for x in (found, expected)))


@pytest.mark.parametrize("count", [8, 3])
def test_decoder_equals_its_twin_also_for_the_first_tokens_only(count):
    decoder = randomised(TiTokDecoderOptions(**TINY | {"grid": (2, 3)}, head=HEAD).build(3))
    embedding, latent = decoder.sequence.embedding, random(2, count, 24)
    front = torch.cat([embedding.class_token, decoder.mask.expand(6, -1)]) + embedding.grid_positions
    joined = torch.cat([front.expand(2, -1, -1), latent + embedding.latent_positions[:count]], 1)
    grid = twin_blocks(decoder.sequence, joined, 2)[:, 1:7]
    expected = twin_pixels(decoder.head, grid.view(2, 2, 3, 24))
    found = decoder(latent)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), latent)[0] for x in (found, expected)))


def twin_pixels(head, grid):
    pixels = grid @ head.projection.weight.T + head.projection.bias
    images = pixels.new_zeros(len(grid), 3, 8, 12)
    for row in range(2):
        for column in range(3):
            patch = pixels[:, row, column].view(-1, 4, 4, 3).permute(0, 3, 1, 2)
            images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = patch
    return F.conv2d(images, head.smoothing.weight, head.smoothing.bias, padding=1)


def test_pixels_in_the_unit_range_become_symmetric():
    torch.manual_seed(0)
    one, other = PatchPixels(3, 8, 4, "unit"), PatchPixels(3, 8, 4, "symmetric")
    other.load_state_dict(one.state_dict())
    grid = torch.randn(1, 2, 3, 8)
    torch.testing.assert_close(one(grid), 2 * other(grid) - 1)


@pytest.mark.parametrize("mixture", ["soft", "likeliest"])
def test_proxy_codes(mixture):
    decoder = randomised(TiTokDecoderOptions(**TINY, head=PROXY | {"mixture": mixture}).build(3))
    latent, head = random(2, 8, 24), decoder.head
    hidden = torch.tanh(decoder.grid(latent) @ head.logits[0].weight.T + head.logits[0].bias)
    logits = hidden @ head.logits[2].weight.T + head.logits[2].bias
    shares = logits.softmax(-1) if mixture == "soft" else F.one_hot(logits.argmax(-1), 16).double()
    torch.testing.assert_close(decoder(latent), head.decoder(shares @ head.codebook))


def test_logits_are_no_image():
    decoder = TiTokDecoderOptions(**TINY, head=LogitsHeadOptions(codes=5)).build(3)
    latent = torch.randn(2, 8, 24)
    assert decoder.head.logits(decoder.grid(latent)).shape == (2, 4, 4, 5)
    sentence = (
        "^this decoder ends in logits over proxy codes: for pixels it needs the head proxy, with the decoder of the "
        "tokenizer that was distilled$"
    )
    with pytest.raises(UserError, match=sentence):
        decoder(latent)


def test_fewer_tokens_decode_through_a_layout():
    tokenizer = TestPixels.options.build().eval()
    tokens = tokenizer.encode(torch.rand(2, 3, 16, 16) * 2 - 1)
    decoded = tokenizer.decode(tokens[:, :5], TokenLayout.sequence(5, (64,)))
    assert decoded.shape == (2, 3, 16, 16)
    assert not torch.equal(decoded, tokenizer.decode(tokens))


@pytest.mark.parametrize("options", [TiTokEncoderOptions(**TINY, patch=4), ViTVQGANEncoderOptions(**GRID)])
def test_other_image_sizes_are_told(options):
    encoder = options.build(3)
    sentence = "^an image of 16x20 cannot be encoded: this encoder is for 16x16$"
    with pytest.raises(UserError, match=sentence):
        encoder(torch.zeros(1, 3, 16, 20))
    with pytest.raises(UserError, match=sentence):
        encoder.latent_space((16, 20))


def test_other_latents_are_told():
    decoder = TiTokDecoderOptions(**TINY).build(3)
    with pytest.raises(UserError, match=r"^the titok decoder takes a latent \(B, N, 24\), got \(1, 8, 23\)$"):
        decoder(torch.zeros(1, 8, 23))
    with pytest.raises(UserError, match=r"^9 latent tokens do not fit: there are 8 positions$"):
        decoder(torch.zeros(1, 9, 24))
    sentence = r"^the vit-vqgan decoder takes a latent \(B, 4, 4, 24\), got \(1, 4, 5, 24\)$"
    with pytest.raises(UserError, match=sentence):
        ViTVQGANDecoderOptions(**GRID).build(3)(torch.zeros(1, 4, 5, 24))


@pytest.mark.parametrize("projection", ["to_codes", "from_codes"])
def test_a_sequence_is_not_convolved(projection):
    encoder, decoder = TiTokEncoderOptions(**TINY, patch=4), TiTokDecoderOptions(**TINY, head=HEAD)
    sentence = "^to_codes and from_codes: a sequence of latents has no grid to convolve, use linear$"
    with pytest.raises(UserError, match=sentence):
        composed(encoder, decoder, **{projection: "convolution"}).build()


def test_vit_vqgan_on_a_grid_that_is_not_square():
    encoder = randomised(ViTVQGANEncoderOptions(**GRID | {"grid": (2, 3)}).build(3))
    decoder = randomised(ViTVQGANDecoderOptions(**GRID | {"grid": (2, 3)}).build(3))
    latent = encoder(random(2, 3, 8, 12))
    sequence = encoder.sequence
    x = encoder.patches(random(2, 3, 8, 12)) + sequence.embedding.grid_positions
    for block in sequence.blocks:
        x = block(x)
    hidden = torch.tanh(encoder.mlp[0](F.layer_norm(x, (24,), sequence.norm_post.weight, sequence.norm_post.bias)))
    torch.testing.assert_close(latent, encoder.mlp[2](hidden).view(2, 2, 3, 24))
    x = decoder.mlp(decoder.sequence(latent.flatten(1, 2)).grid)
    x = F.layer_norm(x, (24,), decoder.norm.weight, decoder.norm.bias)
    torch.testing.assert_close(decoder(latent), twin_pixels(decoder.head, x.view(2, 2, 3, 24)))
