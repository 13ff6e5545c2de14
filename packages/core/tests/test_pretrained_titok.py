"""TiTok's encoder started from a pretrained ViT."""

import pytest
import torch
from safetensors.torch import save_file
from timm.models import VisionTransformer
from torch.testing import assert_close

from smalti.core.backbones.pretrained_titok import PretrainedTiTokOptions
from smalti.core.backbones.titok import TiTokEncoderOptions
from smalti.core.backbones.token_cnn import TokenCNNDecoderOptions
from smalti.core.contracts import Tokenizer
from smalti.core.errors import UserError
from smalti.core.options import Preprocessing
from smalti.core.tokenizer import ComposedOptions

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def timm_vit(path, **changes):
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0}
    model = VisionTransformer(**{**options, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    save_file(model.state_dict(), path)
    return model


def options(path, **changes):
    sizes = {"width": 16, "layers": 2, "heads": 2, "tokens": 3, "patch": 8, "grid": (4, 4)}
    return PretrainedTiTokOptions(**{**sizes, "weights": str(path), **changes})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "vit.safetensors"


@pytest.mark.parametrize(
    ("source", "changes"),
    [
        ({}, {}),
        ({"init_values": 0.1}, {}),
        ({"pre_norm": True}, {"norm_pre": True}),
        ({"class_token": False, "global_pool": "avg", "fc_norm": False}, {"class_token": "none"}),
        ({}, {"image_range": "unit"}),
    ],
    ids=["plain", "layer-scale", "norm-first", "no-class-token", "unit-range"],
)
def test_the_whole_backbone_is_kept(path, source, changes):
    """Without latent tokens, patches come out as timm gives them for normalised images."""
    model = timm_vit(path, **source)
    encoder = options(path, **changes).build(3).eval()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    normalised = ((images + 1) / 2 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        ours = encoder.sequence(encoder.patches(images)).grid
        assert_close(ours, model.forward_features(normalised)[:, -16:], rtol=1e-3, atol=1e-4)
        latents = encoder(images)
    assert latents.shape == (2, 3, 16)
    assert latents.std(dim=1).min() > 0  # latent tokens differ from the first step on


def test_the_published_start(path):
    """Positions, LayerScale and normalisation are lost; all latent tokens are alike."""
    model = timm_vit(path, init_values=0.1)
    encoder = options(path, start="published").build(3).eval()
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = encoder(images)
        for block in model.blocks:
            block.ls1 = block.ls2 = torch.nn.Identity()
        model.pos_embed.zero_()
        assert_close(encoder.sequence(encoder.patches(images)).grid, model.forward_features(images)[:, -16:])
    assert_close(latents, latents[:, :1].expand(-1, 3, -1))


def test_saved_tokenizers_do_not_need_the_source(path, tmp_path):
    timm_vit(path)
    tokenizer = ComposedOptions(
        preprocessing=Preprocessing(image_size=32),
        encoder=options(path),
        quantizer={"name": "signs", "dim": 4},
        decoder=TokenCNNDecoderOptions(
            width=12, tokens=3, grid=(4, 4), channels=32, multipliers=(1, 1, 1, 1), blocks=1
        ),
    ).build()
    assert type(tokenizer.options.encoder) is TiTokEncoderOptions
    tokenizer.eval().save_pretrained(tmp_path / "saved")
    path.unlink()
    loaded = Tokenizer.from_pretrained(tmp_path / "saved")
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(loaded.encode(images), tokenizer.encode(images))


def test_everything_is_trained(path):
    timm_vit(path)
    encoder = options(path).build(3)
    encoder(torch.rand(2, 3, 32, 32)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


@pytest.mark.parametrize(
    ("source", "changes", "sentence"),
    [
        ({"reg_tokens": 2}, {}, "has register tokens, which titok has not: take the encoder timm"),
        ({"pre_norm": True}, {}, "cannot start a titok: it has sequence.norm_pre.bias"),
        ({}, {"norm_pre": True}, "cannot start a titok: it lacks sequence.norm_pre.bias"),
        (
            {},
            {"mlp_width": 32},
            "cannot start a titok: its sequence.blocks.0.mlp.0.weight is (64, 16), should be (32, 16)",
        ),
    ],
)
def test_backbones_that_do_not_fit(path, source, changes, sentence):
    timm_vit(path, **source)
    with pytest.raises(UserError) as error:
        options(path, **changes).build(3)
    assert str(error.value) == f"{path} {sentence}"


def test_grey_images(path):
    with pytest.raises(UserError, match=r"^a pretrained ViT takes images of 3 channels, not 1$"):
        options(path).build(1)
