import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent / "toy"))

from hypothesis import given, settings
from hypothesis import strategies as st
from toy_components import SignsOptions

from smalti.core.backbones.adaptive_norm import AdaptiveGroupNorm
from smalti.core.backbones.resampling import Downsample, Upsample
from smalti.core.backbones.residual_block import ResidualBlock
from smalti.core.backbones.simple_cnn import SimpleCNNDecoderOptions, SimpleCNNEncoderOptions
from smalti.core.backbones.spatial_attention import SpatialAttention
from smalti.core.backbones.vqgan import VQGANDecoderOptions, VQGANEncoderOptions
from smalti.core.errors import UserError
from smalti.core.options import Preprocessing
from smalti.core.testing import TokenizerContract
from smalti.core.tokenizer import ComposedOptions

SMALL = {"width": 8, "multipliers": (1, 2), "groups": 4, "blocks": 1, "latent_width": 6}
OPEN_MAGVIT2 = {"attention_levels": (), "middle_attention": False, "bias": False}
MASKGIT = {**OPEN_MAGVIT2, "shortcut": "output", "image_range": "unit"}
# Encoder and decoder as each descendant has them.
FAMILY = {
    "vqgan": ({}, {}),
    "open-magvit2": (
        {**OPEN_MAGVIT2, "downsampling": "symmetric", "last_kernel": 1},
        {**OPEN_MAGVIT2, "upsampling": "shuffle", "adaptive": True},
    ),
    "maskgit": ({**MASKGIT, "downsampling": "average", "last_kernel": 1}, MASKGIT),
}


def family(name):
    encoder, decoder = FAMILY[name]
    torch.manual_seed(1)
    return (
        VQGANEncoderOptions(**SMALL, **encoder).build(3).eval(),
        VQGANDecoderOptions(**SMALL, **decoder).build(3).eval(),
    )


class TestVQGAN(TokenizerContract):
    options = ComposedOptions(
        preprocessing=Preprocessing(image_size=8),
        encoder=VQGANEncoderOptions(**SMALL),
        quantizer=SignsOptions(dim=5),
        decoder=VQGANDecoderOptions(**SMALL),
    )


class TestOpenMAGVIT2(TokenizerContract):
    options = ComposedOptions(
        preprocessing=Preprocessing(image_size=8),
        encoder=VQGANEncoderOptions(**SMALL, **FAMILY["open-magvit2"][0]),
        quantizer=SignsOptions(dim=6),
        decoder=VQGANDecoderOptions(**SMALL, **FAMILY["open-magvit2"][1]),
        to_codes="none",
        from_codes="none",
    )


class TestSimpleCNN(TokenizerContract):
    options = ComposedOptions(
        preprocessing=Preprocessing(image_size=8),
        encoder=SimpleCNNEncoderOptions(width=64),
        quantizer=SignsOptions(dim=5),
        decoder=SimpleCNNDecoderOptions(width=64),
    )


def agree(module, twin, x):
    """Values, and the gradients of the input and of every weight."""
    x = x.double().requires_grad_()
    module = module.double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    probe = None
    results = []
    for function in (module, twin):
        y = function(x)
        probe = torch.randn_like(y) if probe is None else probe
        gradients = torch.autograd.grad((y * probe).sum(), [x, *module.parameters()])
        results.append([y, *gradients])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def convolved(x, layer):
    """A 3 x 3 convolution with zeros around, as a sum over its places."""
    *_, height, width = x.shape
    padded = torch.zeros(*x.shape[:2], height + 2, width + 2, dtype=x.dtype)
    padded[..., 1:-1, 1:-1] = x
    total = 0.0 if layer.bias is None else layer.bias[:, None, None]
    for row in range(3):
        for column in range(3):
            shifted = padded[..., row : row + height, column : column + width]
            total = total + torch.einsum("bihw,oi->bohw", shifted, layer.weight[:, :, row, column])
    return total


def normalised(x, layer, groups):
    parts = x.unflatten(1, (groups, -1))
    mean = parts.mean((2, 3, 4), keepdim=True)
    variance = (parts - mean).square().mean((2, 3, 4), keepdim=True)
    y = ((parts - mean) / (variance + layer.eps).sqrt()).flatten(1, 2)
    return y * layer.weight[:, None, None] + layer.bias[:, None, None]


@pytest.mark.parametrize("shortcut", ["input", "output"])
@pytest.mark.parametrize(("outputs", "bias"), [(8, True), (12, True), (12, False)])
def test_residual_block(shortcut, outputs, bias):
    block = ResidualBlock(8, outputs, groups=4, bias=bias, shortcut=shortcut)

    def twin(x):
        y = normalised(x, block.norm1, 4)
        y = convolved(y * y.sigmoid(), block.conv1)
        y = normalised(y, block.norm2, 4)
        y = convolved(y * y.sigmoid(), block.conv2)
        if outputs == 8:
            return x + y
        skipped = torch.einsum("bihw,oi->bohw", x if shortcut == "input" else y, block.shortcut.weight[:, :, 0, 0])
        return y + skipped + (block.shortcut.bias[:, None, None] if bias else 0)

    agree(block, twin, torch.randn(2, 8, 3, 5))


def test_dropout_within_the_block_only_in_training():
    block = ResidualBlock(8, 8, groups=4, dropout=0.5)
    x = torch.randn(1, 8, 4, 4)
    assert not torch.equal(block.train()(x), block(x))
    assert torch.equal(block.eval()(x), block(x))


def test_attention():
    attention = SpatialAttention(8, groups=4)

    def twin(x):
        q, k, v = (
            torch.einsum("bihw,oi->bohw", normalised(x, attention.norm, 4), weight[:, :, 0, 0]) + bias[:, None, None]
            for weight, bias in zip(attention.qkv.weight.chunk(3), attention.qkv.bias.chunk(3), strict=True)
        )
        scores = torch.einsum("bchw,bcij->bhwij", q, k) * 8**-0.5
        weights = scores.flatten(3).softmax(-1).view_as(scores)
        mixed = torch.einsum("bhwij,bcij->bchw", weights, v)
        out = torch.einsum("bihw,oi->bohw", mixed, attention.out.weight[:, :, 0, 0])
        return x + out + attention.out.bias[:, None, None]

    agree(attention, twin, torch.randn(2, 8, 3, 5))


@pytest.mark.parametrize("kind", ["asymmetric", "symmetric", "average"])
def test_downsample(kind):
    layer = Downsample(4, kind)

    def twin(x):
        if kind == "average":
            return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
        start = 1 if kind == "asymmetric" else 0  # the same convolution, looked at from another place
        return convolved(x, layer.conv)[..., start::2, start::2]

    agree(layer, twin, torch.randn(2, 4, 4, 6))


def test_upsample_nearest():
    layer = Upsample(4, "nearest")
    agree(
        layer,
        lambda x: convolved(x.repeat_interleave(2, 2).repeat_interleave(2, 3), layer.conv),
        torch.randn(2, 4, 3, 5),
    )


def test_upsample_shuffle():
    layer = Upsample(4, "shuffle")

    def twin(x):
        y = convolved(x, layer.conv)
        top = torch.stack([y[:, :4], y[:, 4:8]], -1).flatten(-2)
        bottom = torch.stack([y[:, 8:12], y[:, 12:]], -1).flatten(-2)
        return torch.stack([top, bottom], 3).flatten(2, 3)

    agree(layer, twin, torch.randn(2, 4, 3, 5))


def test_adaptive_norm():
    layer = AdaptiveGroupNorm(8, 3, groups=4)
    latent = torch.randn(2, 3, 2, 3).double()

    def twin(x):
        plain = nn.GroupNorm(4, 8, 1e-6).double()
        count = 6
        mean = latent.sum((2, 3)) / count
        variance = (latent - mean[..., None, None]).square().sum((2, 3)) / (count - 1)
        gamma = (variance + 1e-6).sqrt() @ layer.gamma.weight.T + layer.gamma.bias
        beta = mean @ layer.beta.weight.T + layer.beta.bias
        return normalised(x, plain, 4) * gamma[..., None, None] + beta[..., None, None]

    agree_on_input = torch.randn(2, 8, 4, 6)
    agree(_Bound(layer, latent), twin, agree_on_input)


def test_one_position_has_no_deviation():
    decoder = family("open-magvit2")[1]
    sentence = "^adaptive normalisation needs a latent of two positions or more: give larger images$"
    with pytest.raises(UserError, match=sentence):
        decoder(torch.zeros(2, 1, 1, 6))


class _Bound(nn.Module):
    def __init__(self, layer, latent):
        super().__init__()
        self.layer, self.latent = layer, latent

    def forward(self, x):
        return self.layer(x, self.latent)


@pytest.mark.parametrize("name", FAMILY)
@settings(deadline=None, max_examples=8)
@given(height=st.integers(1, 4), width=st.integers(2, 4), batch=st.integers(1, 3))
def test_any_size_and_any_batch(name, height, width, batch):
    encoder, decoder = family(name)
    images = torch.rand(batch, 3, 2 * height, 2 * width) * 2 - 1
    with torch.no_grad():
        latent = encoder(images)
        assert latent.shape == (batch, height, width, 6)
        assert encoder.latent_space((2 * height, 2 * width)) == (height, width)
        decoded = decoder(latent)
        assert decoded.shape == images.shape
        torch.testing.assert_close(decoder(encoder(images[-1:])), decoded[-1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILY)
def test_compiles_whole(name):
    for network, shape in zip(family(name), ((2, 3, 8, 12), (2, 4, 6, 6)), strict=True):
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(network, fullgraph=True, backend="aot_eager")(x), network(x))


@pytest.mark.parametrize("name", FAMILY)
def test_half_precision_and_channels_last(name):
    encoder, decoder = family(name)
    images = torch.rand(2, 3, 8, 12) * 2 - 1
    with torch.no_grad():
        latent = encoder(images)
        decoded = decoder(latent)
        with torch.autocast("cpu", torch.bfloat16):
            assert (encoder(images) - latent).abs().max() < 0.05 * latent.std() + 0.05
            assert (decoder(latent) - decoded).abs().max() < 0.05 * decoded.std() + 0.05
        encoder, decoder = encoder.to(memory_format=torch.channels_last), decoder.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(encoder(images), latent, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(decoder(latent), decoded, rtol=1e-4, atol=1e-5)


def test_maskgit_takes_and_gives_images_from_0_to_1():
    encoder, decoder = family("maskgit")
    symmetric = VQGANEncoderOptions(**{**encoder.options.model_dump(), "image_range": "symmetric"}).build(3).eval()
    symmetric.load_state_dict(encoder.state_dict())
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    assert torch.equal(encoder(images), symmetric((images + 1) / 2))
    plain = VQGANDecoderOptions(**{**decoder.options.model_dump(), "image_range": "symmetric"}).build(3).eval()
    plain.load_state_dict(decoder.state_dict())
    latent = torch.randn(1, 4, 4, 6)
    assert torch.equal((decoder(latent) + 1) / 2, (2 * plain(latent) - 1 + 1) / 2)


def test_attention_where_it_is_asked_for():
    encoder = VQGANEncoderOptions(**SMALL | {"multipliers": (1, 1, 2), "blocks": 2}, attention_levels=(0, -1)).build(3)
    found = [[isinstance(layer, SpatialAttention) for layer in level.attentions] for level in encoder.trunk.levels]
    assert found == [[True, True], [False, False], [True, True]]
    assert [type(layer) for layer in encoder.trunk.middle] == [ResidualBlock, SpatialAttention, ResidualBlock]


def test_published_sizes():
    def millions(*options):
        with torch.device("meta"):
            return sum(p.numel() for o in options for p in o.build(3).parameters()) / 1e6

    # without the quantizer: 71.88 and 70.11 less 16384 codes of 8 and the projections to and from them
    codes = (16384 * 8 + 256 * 8 + 8 + 8 * 256 + 256) / 1e6
    assert round(millions(VQGANEncoderOptions(), VQGANDecoderOptions()) + codes, 2) == 71.88
    eight = {"multipliers": (1, 2, 2, 4)}
    assert round(millions(VQGANEncoderOptions(**eight), VQGANDecoderOptions(**eight)) + codes, 2) == 70.11


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (
            lambda: family("vqgan")[0](torch.zeros(1, 3, 7, 8)),
            "an image of 7x8 cannot be encoded: both sides must be multiples of 2",
        ),
        (
            lambda: family("vqgan")[1](torch.zeros(1, 6, 4, 4)),
            r"the vqgan decoder takes a latent \(B, h, w, 6\), got \(1, 6, 4, 4\)",
        ),
        (
            lambda: family("vqgan")[0](torch.zeros(1, 1, 8, 8)),
            r"images must be float \(B, 3, H, W\) in \[-1, 1\], got torch.float32 \(1, 1, 8, 8\)",
        ),
        (
            lambda: SimpleCNNEncoderOptions(width=8).build(3)(torch.zeros(1, 3, 8, 6)),
            "an image of 8x6 cannot be encoded: both sides must be multiples of 4",
        ),
        (
            lambda: SimpleCNNDecoderOptions(width=8).build(3)(torch.zeros(1, 2, 2, 4)),
            r"the simple-cnn decoder takes a latent \(B, h, w, 8\), got \(1, 2, 2, 4\)",
        ),
    ],
)
def test_what_cannot_be_taken(build, sentence):
    with pytest.raises(UserError, match=f"^{sentence}$"):
        build()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"groups": 3}, "width 8 cannot be divided into 3 normalisation groups"),
        ({"attention_levels": (2,)}, "attention_levels has 2, but there are 2 levels, 0 to 1"),
        ({"attention_levels": (-3,)}, "attention_levels has -3, but there are 2 levels, 0 to 1"),
    ],
)
def test_options_that_do_not_fit(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        VQGANEncoderOptions(**SMALL | options)


def test_an_odd_width_of_the_simple_cnn():
    with pytest.raises(ValueError, match="width must be even, got 7"):
        SimpleCNNEncoderOptions(width=7)


def test_simple_cnn():
    encoder, decoder = SimpleCNNEncoderOptions(width=8).build(3), SimpleCNNDecoderOptions(width=8).build(3)

    def blocks(x, blocks):
        for block in blocks:
            x = x.clamp(min=0)
            inner = convolved(x, block.conv1).clamp(min=0)
            x = x + torch.einsum("bihw,oi->bohw", inner, block.conv2.weight[:, :, 0, 0])
        return x

    def leaky(x):
        return torch.where(x > 0, x, 0.01 * x)

    def encoded(images):
        first, second, third = encoder.convolutions
        x = leaky(F.conv2d(images, first.weight, first.bias, stride=2, padding=1))
        x = leaky(F.conv2d(x, second.weight, second.bias, stride=2, padding=1))
        return blocks(convolved(x, third), encoder.blocks).permute(0, 2, 3, 1)

    def decoded(latent):
        first, *transposed = decoder.convolutions
        x = convolved(leaky(blocks(latent.permute(0, 3, 1, 2), decoder.blocks)), first)
        for layer in transposed:
            x = F.conv_transpose2d(leaky(x), layer.weight, layer.bias, stride=2, padding=1)
        return x.tanh()

    agree(encoder, encoded, torch.randn(2, 3, 8, 12))
    agree(decoder, decoded, torch.randn(2, 2, 3, 8))
    with torch.no_grad():
        latent = encoder(torch.rand(1, 3, 8, 8).double())
        compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(
            compiled(torch.zeros(1, 3, 8, 8).double()), encoder(torch.zeros(1, 3, 8, 8).double())
        )
        assert decoder(latent).abs().max() <= 1
