"""Vision towers of transformers as encoders."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from smalti.core.backbones.cnn import CNNDecoderOptions
from smalti.core.backbones.transformers_encoder import TransformersEncoderOptions
from smalti.core.contracts import Tokenizer
from smalti.core.errors import UserError
from smalti.core.options import Preprocessing
from smalti.core.tokenizer import ComposedOptions

VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
STATISTICS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}


def tower(name):
    torch.manual_seed(0)
    match name:
        case "clip":
            return transformers.CLIPModel(transformers.CLIPConfig(vision_config=VISION, text_config=TEXT))
        case "siglip":
            return transformers.SiglipModel(transformers.SiglipConfig(vision_config=VISION, text_config=TEXT))
        case "vit":
            return transformers.ViTModel(transformers.ViTConfig(**VISION))
        case "dinov2":
            return transformers.Dinov2Model(transformers.Dinov2Config(**VISION, layerscale_value=0.5))


@pytest.fixture
def saved(tmp_path):
    """A function that saves a model with its preprocessor as the hub has them, and returns the folder and the tower."""

    def save(name):
        folder, model = tmp_path / name, tower(name).eval()
        model.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(STATISTICS))
        return str(folder), getattr(model, "vision_model", model)

    return save


def images(height=32, width=32):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("name", ["clip", "siglip", "vit", "dinov2"])
def test_features_are_the_towers(saved, name):
    folder, model = saved(name)
    encoder = TransformersEncoderOptions(model=folder).build(3).eval()
    mean, std = (torch.tensor(STATISTICS[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    with torch.no_grad():
        expected = model(((images() + 1) / 2 - mean) / std).last_hidden_state[:, -16:]
        assert_close(encoder(images()).flatten(1, 2), expected)
        assert encoder(images(32, 48)).shape == (2, 4, 6, 32)
    assert encoder.latent_space((32, 48)) == (4, 6)


@pytest.mark.parametrize("tuning", ["full", "frozen", "lora"])
@pytest.mark.parametrize("name", ["clip", "vit"])
def test_gradients_where_they_should_be(saved, name, tuning):
    """Also not in poolers, which features do not need."""
    encoder = TransformersEncoderOptions(model=saved(name)[0], tuning=tuning).build(3).train()
    x = images().requires_grad_()
    encoder(x).square().mean().backward()
    named = dict(encoder.named_parameters())
    trained = {name for name, p in named.items() if p.requires_grad}
    assert {name for name, p in named.items() if p.grad is not None} == trained
    idle = {name for name in named if "pooler" in name or "post_layernorm" in name}
    expected = {
        "full": set(named) - idle,
        "frozen": set(),
        "lora": {name for name in named if "lora_" in name},
    }
    assert trained == expected[tuning]
    assert encoder.backbone.training == (tuning != "frozen")
    assert not any("pooler" in name for name in expected["lora"])


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_saved_tokenizers_do_not_need_the_source(saved, tmp_path, tuning):
    folder, _ = saved("dinov2")
    tokenizer = ComposedOptions(
        preprocessing=Preprocessing(image_size=32),
        encoder=TransformersEncoderOptions(model=folder, tuning=tuning),
        quantizer={"name": "signs", "dim": 4},
        decoder=CNNDecoderOptions(widths=(8, 8, 8), blocks=0),
    ).build()
    tokenizer.eval().save_pretrained(tmp_path / "saved")
    (tmp_path / "dinov2").rename(tmp_path / "gone")
    loaded = Tokenizer.from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded.encode(images()), tokenizer.encode(images()))
    assert loaded.options.encoder.mean == (0.5, 0.4, 0.3)


def told(model):
    with pytest.raises(UserError) as error:
        TransformersEncoderOptions(model=str(model)).build(3)
    return str(error.value)


def test_what_is_not_there(tmp_path, monkeypatch):
    def offline(name):
        raise OSError(f"cannot reach {name}")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    monkeypatch.setattr("transformers.utils.cached_file", lambda *_, **__: None)
    assert told("openai/clip-vit-base-patch16") == (
        "openai/clip-vit-base-patch16 could not be had: give a folder with config.json, preprocessor_config.json and "
        "model.safetensors from https://huggingface.co/openai/clip-vit-base-patch16, or a hub name that can be reached"
    )


def test_weights_of_another_tower(saved, tmp_path):
    folder, _ = saved("vit")
    path = tmp_path / "vit" / "model.safetensors"
    whole = load_file(path)
    left_out = min(name for name in whole if "mlp" in name or "intermediate" in name)
    save_file({name: tensor for name, tensor in whole.items() if name != left_out}, path, {"format": "pt"})
    assert told(folder).startswith(f"{folder} does not hold the weights of its vision tower: it lacks ")
    save_file({name: tensor[:1] for name, tensor in whole.items()}, path, {"format": "pt"})
    assert told(folder) == f"the weights of {folder} are of other shapes than its config.json says"


def test_towers_without_a_token_per_patch(tmp_path):
    swin = transformers.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2])
    transformers.SwinModel(swin).save_pretrained(tmp_path / "swin")
    assert told(tmp_path / "swin") == f"{tmp_path}/swin gives no token per patch, which the transformers encoder needs"
    transformers.ViTMAEModel(transformers.ViTMAEConfig(**VISION)).save_pretrained(tmp_path / "mae")
    assert told(tmp_path / "mae") == (f"{tmp_path}/mae hides patches at random: take its weights with the encoder timm")
    backbone = transformers.Dinov2Config(**VISION, out_features=["stage1", "stage2"])
    transformers.DepthAnythingConfig(backbone_config=backbone).save_pretrained(tmp_path / "depth")
    assert told(tmp_path / "depth") == (
        f"{tmp_path}/depth wraps a backbone: take its weights with the encoder timm, weights: {tmp_path}/depth"
    )


@pytest.mark.parametrize("architecture", [{}, {"model_type": "mosaic"}])
def test_an_architecture_that_is_none(architecture):
    sentence = "^architecture: transformers knows no model_type (None|'mosaic'); take over a tower's config.json$"
    with pytest.raises(UserError, match=sentence):
        TransformersEncoderOptions(model="x", architecture=architecture).build(3)


def test_wrong_images(saved):
    encoder = TransformersEncoderOptions(model=saved("vit")[0]).build(3)
    with pytest.raises(UserError, match=r"^an image of 30x32 cannot be encoded: both sides must be multiples of 8$"):
        encoder(images(30, 32))
    with pytest.raises(UserError, match=r"^the transformers encoder takes images of 3 channels, not 1$"):
        TransformersEncoderOptions(model="x").build(1)
