import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent / "toy"))

from toy_components import SignsOptions

from smalti.core.backbones.latent_grid_vit import LatentGridDecoderOptions, LatentGridEncoderOptions
from smalti.core.contracts import Tokenizer
from smalti.core.errors import UserError
from smalti.core.options import Preprocessing
from smalti.core.testing import TokenizerContract
from smalti.core.tokenizer import ComposedOptions

TINY = {"width": 24, "depth": 2, "heads": 2, "patch": 4, "image_size": 16, "grid": 4, "layer_scale": 0.5}


def composed(**changes):
    options = TINY | changes
    return ComposedOptions(
        preprocessing=Preprocessing(image_size=16),
        encoder=LatentGridEncoderOptions(**options, branches=2, code_width=3),
        quantizer=SignsOptions(dim=6),
        decoder=LatentGridDecoderOptions(**options),
        to_codes="none",
    )


class TestShared(TokenizerContract):
    options = composed(grid=3)


class TestLearned(TokenizerContract):
    options = composed(positions="learned")


def randomised(module):
    """Weights of ordinary size, so that no part hides behind a start near zero."""
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(std=0.3)
    return module.double().eval()


def images_of(*shape):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1).requires_grad_()


def twin_transformer(tokens, transformer, heads):
    """The blocks in so many words."""
    for block in transformer.blocks:
        normed = F.layer_norm(tokens, tokens.shape[-1:], block.norm1.weight, block.norm1.bias, 1e-6)
        query, key, value = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in block.attention.qkv(normed).chunk(3, -1)
        )
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        tokens = tokens + block.scale1 * block.attention.out(mixed)
        normed = F.layer_norm(tokens, tokens.shape[-1:], block.norm2.weight, block.norm2.bias, 1e-6)
        hidden = block.mlp[0](normed)
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        tokens = tokens + block.scale2 * block.mlp[2](hidden)
    return F.layer_norm(tokens, tokens.shape[-1:], transformer.norm.weight, transformer.norm.bias, 1e-6)


def table(positions, grid):
    """A square table `(1, n^2, D)` on another grid, in single precision as the networks resample it."""
    side = int(positions.shape[1] ** 0.5)
    if (side, side) == grid:
        return positions
    square = positions.float().view(1, side, side, -1).permute(0, 3, 1, 2)
    return F.interpolate(square, grid, mode="bicubic", antialias=True).flatten(2).transpose(1, 2).double()


def twin_encoder(encoder, images, grid):
    options, transformer = encoder.options, encoder.transformer
    patches = F.conv2d(images, encoder.patches.weight, encoder.patches.bias, stride=options.patch)
    positions = table(transformer.positions[:, 1:], tuple(patches.shape[2:]))
    first = transformer.class_token + transformer.positions[:, :1]
    parts = [first.expand(len(images), -1, -1), patches.flatten(2).transpose(1, 2) + positions]
    area = options.grid**2
    for branch in range(options.branches):
        span = slice(branch * area, (branch + 1) * area)
        latents = table(encoder.latent_tokens[:, span], grid)
        if options.positions == "shared":
            latents = latents + table(transformer.positions[:, 1:], grid) + encoder.levels[branch + 1]
        else:
            latents = latents + table(encoder.latent_positions[:, span], grid)
        parts.append(latents.expand(len(images), -1, -1))
    if options.positions == "shared":
        parts[:2] = [part + encoder.levels[0] for part in parts[:2]]
    read = twin_transformer(torch.cat(parts, 1), transformer, options.heads)[:, -options.branches * grid[0] * grid[1] :]
    codes = read @ encoder.to_code.weight.T + encoder.to_code.bias
    return torch.cat([part.unflatten(1, grid) for part in codes.chunk(options.branches, 1)], -1)


def twin_decoder(decoder, latent, patches):
    options, transformer = decoder.options, decoder.transformer
    batch, grid = len(latent), tuple(latent.shape[1:3])
    first = (transformer.class_token + transformer.positions[:, :1]).expand(batch, -1, -1)
    masked = decoder.mask_token + table(transformer.positions[:, 1:], patches)
    parts = [first, masked.expand(batch, -1, -1)]
    latent = latent.flatten(1, 2)
    if options.positions == "shared":
        parts = [part + decoder.levels[0] for part in parts]
        latent = torch.cat([first, latent + table(transformer.positions[:, 1:], grid)], 1) + decoder.levels[1]
    else:
        latent = latent + table(decoder.latent_positions, grid)
    area = patches[0] * patches[1]
    filled = twin_transformer(torch.cat([*parts, latent], 1), transformer, options.heads)[:, 1 : 1 + area]
    pixels = filled @ decoder.to_pixels.weight.T + decoder.to_pixels.bias
    images = torch.zeros(batch, 3, 4 * patches[0], 4 * patches[1], dtype=latent.dtype)
    for place in range(area):
        row, column = divmod(place, patches[1])
        patch = pixels[:, place].view(batch, 4, 4, 3).permute(0, 3, 1, 2)
        images[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = patch
    return images


@pytest.mark.parametrize("positions", ["shared", "learned"])
@pytest.mark.parametrize("size", [(16, 16), (16, 32)])
@pytest.mark.parametrize("grid", [4, 3])
def test_encoder_equals_its_twin(positions, size, grid):
    if grid == 3 and size == (16, 32):
        grid = 2  # so that the grid grows with the image by whole places
    options = TINY | {"positions": positions, "grid": grid}
    encoder = randomised(LatentGridEncoderOptions(**options, branches=2, code_width=3).build(3))
    images = images_of(2, 3, *size)
    space = encoder.latent_space(size)
    assert space == (grid, grid * size[1] // 16)
    found, expected = encoder(images), twin_encoder(encoder, images, space)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        *(torch.autograd.grad(latent.square().sum(), images)[0] for latent in (found, expected)), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("positions", ["shared", "learned"])
@pytest.mark.parametrize(("grid", "space", "patches"), [(4, (4, 4), (4, 4)), (4, (2, 6), (2, 6)), (2, (2, 3), (4, 6))])
def test_decoder_equals_its_twin(positions, grid, space, patches):
    decoder = randomised(LatentGridDecoderOptions(**TINY | {"positions": positions, "grid": grid}).build(3))
    latent = images_of(2, *space, 24)
    found, expected = decoder(latent), twin_decoder(decoder, latent, patches)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        *(torch.autograd.grad(images.square().sum(), latent)[0] for images in (found, expected)), rtol=1e-6, atol=1e-6
    )


@settings(deadline=None, max_examples=20)
@given(grid=st.integers(1, 6), patch=st.sampled_from([2, 4, 8]), steps=st.tuples(st.integers(1, 3), st.integers(1, 3)))
def test_decoded_images_have_the_size_of_encoded_ones(grid, patch, steps):
    options = {"width": 4, "depth": 1, "heads": 1, "patch": patch, "image_size": 16, "grid": grid}
    encoder = LatentGridEncoderOptions(**options).build(3)
    size = tuple(steps[axis] * encoder.options.image_step for axis in range(2))
    latent = encoder(torch.zeros(1, 3, *size))
    assert latent.shape == (1, *encoder.latent_space(size), 4)
    assert LatentGridDecoderOptions(**options).build(3)(latent).shape == (1, 3, *size)


def test_sizes_that_are_refused():
    eleven = TINY | {"grid": 3}
    encoder, decoder = LatentGridEncoderOptions(**eleven).build(3), LatentGridDecoderOptions(**eleven).build(3)
    with pytest.raises(UserError, match=r"^an image of 16x20 cannot be encoded: both sides must be multiples of 16$"):
        encoder(torch.zeros(1, 3, 16, 20))
    with pytest.raises(UserError, match=r"^a latent of 3x4 cannot be decoded: both sides must be multiples of 3$"):
        decoder(torch.zeros(1, 3, 4, 24))
    with pytest.raises(UserError, match=r"takes a latent \(B, h, w, 24\), got \(1, 3, 3, 5\)$"):
        decoder(torch.zeros(1, 3, 3, 5))


def test_options_must_agree():
    with pytest.raises(ValueError, match="width 24 cannot be divided among 5 heads"):
        LatentGridEncoderOptions(**TINY | {"heads": 5})
    with pytest.raises(ValueError, match="image_size 16 cannot be divided into patches of 3"):
        LatentGridDecoderOptions(**TINY | {"patch": 3})


def test_stochastic_depth_grows_linearly():
    encoder = LatentGridEncoderOptions(**TINY | {"depth": 3, "drop_path": 0.2}).build(3)
    assert [block.drop_path.probability for block in encoder.transformer.blocks] == pytest.approx([0.0, 0.1, 0.2])


# ---- starting from a pretrained ViT

TIMM_BLOCK = {
    "norm1.weight": (24,), "norm1.bias": (24,), "norm2.weight": (24,), "norm2.bias": (24,),
    "attn.qkv.weight": (72, 24), "attn.qkv.bias": (72,), "attn.proj.weight": (24, 24), "attn.proj.bias": (24,),
    "mlp.fc1.weight": (96, 24), "mlp.fc1.bias": (96,), "mlp.fc2.weight": (24, 96), "mlp.fc2.bias": (24,),
}  # fmt: skip


def timm_weights(**more):
    """A ViT of TINY's size under timm's names."""
    shapes = {
        "cls_token": (1, 1, 24), "pos_embed": (1, 17, 24), "norm.weight": (24,), "norm.bias": (24,),
        "patch_embed.proj.weight": (24, 3, 4, 4), "patch_embed.proj.bias": (24,),
    }  # fmt: skip
    for block in range(2):
        shapes |= {f"blocks.{block}.{name}": shape for name, shape in (TIMM_BLOCK | more).items()}
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_pretrained_start(tmp_path):
    weights = timm_weights(**{"ls1.gamma": (24,), "ls2.gamma": (24,)})
    source = tmp_path / "vit.pt"
    torch.save(weights, source)
    tokenizer = composed(pretrained=str(source)).build()
    for part in (tokenizer.encoder, tokenizer.decoder):
        state = part.transformer.state_dict()
        assert torch.equal(state["class_token"], weights["cls_token"])
        assert torch.equal(state["positions"], weights["pos_embed"])
        assert torch.equal(state["blocks.1.attention.qkv.weight"], weights["blocks.1.attn.qkv.weight"])
        assert torch.equal(state["blocks.0.scale2"], weights["blocks.0.ls2.gamma"])
        assert torch.equal(state["norm.bias"], weights["norm.bias"])
    assert torch.equal(tokenizer.encoder.patches.weight, weights["patch_embed.proj.weight"])
    source.unlink()
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = Tokenizer.from_pretrained(tmp_path / "saved")
    assert torch.equal(saved.encoder.transformer.positions, weights["pos_embed"])


def test_pretrained_start_without_layer_scale(tmp_path):
    torch.save(timm_weights(), tmp_path / "vit.pt")
    encoder = LatentGridEncoderOptions(**TINY, pretrained=str(tmp_path / "vit.pt")).build(3)
    assert torch.equal(encoder.transformer.blocks[1].scale1, torch.ones(24))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"norm_pre.weight": torch.zeros(24)}, "it has norm_pre.weight$"),
        ({"cls_token": None}, "it lacks class_token$"),
        ({"norm.bias": torch.zeros(3)}, r"its norm.bias is \(3,\), should be \(24,\)$"),
    ],
)
def test_pretrained_start_that_does_not_fit(tmp_path, change, sentence):
    weights = {name: tensor for name, tensor in (timm_weights() | change).items() if tensor is not None}
    if "cls_token" not in weights:
        weights["pos_embed"] = weights["pos_embed"][:, 1:]
    torch.save(weights, tmp_path / "vit.pt")
    with pytest.raises(UserError, match=f"vit.pt cannot start a latent-grid-vit: {sentence}"):
        LatentGridEncoderOptions(**TINY, pretrained=str(tmp_path / "vit.pt")).build(3)
