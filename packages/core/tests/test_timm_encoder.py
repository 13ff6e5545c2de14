"""Vision transformers of timm as encoders, and what of them is trained."""

import pytest
import timm
import torch
import transformers
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from smalti.core.backbones import pretrained
from smalti.core.backbones.timm_encoder import TimmEncoderOptions
from smalti.core.backbones.token_cnn import TokenCNNDecoderOptions
from smalti.core.contracts import Tokenizer
from smalti.core.errors import UserError
from smalti.core.options import Preprocessing
from smalti.core.tokenizer import ComposedOptions
from smalti.core.training.ema import EMA

MODEL = "test_vit2.r160_in1k"  # 64 wide, 8 blocks, LayerScale


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of the model's layout, and the model."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=7).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("timm") / "model.safetensors"
    save_file(model.state_dict(), path)
    return path, model


def built(weights, **changes):
    torch.manual_seed(1)
    return TimmEncoderOptions(**{"model": MODEL, "weights": str(weights[0]), "image_size": 160, **changes}).build(3)


def images(height=64, width=64):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_features_are_timms(weights):
    """Images are normalised as the model wants; the class token stays behind."""
    model = weights[1]
    x = images(160, 160)
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        features = model.fc_norm(model.forward_features(((x + 1) / 2 - mean) / std))
        assert_close(built(weights).eval()(x), features[:, 1:].unflatten(1, (10, 10)))


def test_other_sizes(weights):
    encoder = built(weights).eval()
    assert encoder(images(64, 96)).shape == (2, 4, 6, 64)
    assert encoder.latent_space((64, 96)) == (4, 6)
    with pytest.raises(UserError, match=r"^an image of 60x64 cannot be encoded: both sides must be multiples of 16$"):
        encoder(images(60, 64))


def test_another_patch_size(weights):
    """Larger patches of a larger image see what the smaller ones saw."""
    encoder = built(weights, patch=32, image_size=320)
    assert encoder(images(128, 64)).shape == (2, 4, 2, 64)
    assert encoder.backbone.patch_embed.proj.weight.shape[-1] == 32


def test_latent_tokens(weights):
    encoder = built(weights, latents=5).eval()
    x = images()
    with torch.no_grad():
        latents = encoder(x)
        assert_close(latents[1:], encoder(x[1:]))
        assert not torch.allclose(latents, encoder(x.flip(-1)))
    assert latents.shape == (2, 5, 64)
    assert encoder.latent_space((64, 96)) == (5,)
    assert latents.std(dim=1).min() > 0


def learning(encoder):
    """Names of what got a gradient, and of what may be trained."""
    encoder.train()(images()).square().mean().backward()
    named = list(encoder.named_parameters())
    return {n for n, p in named if p.grad is not None}, {n for n, p in named if p.requires_grad}


def test_full_tuning(weights):
    encoder = built(weights, latents=2)
    got, may = learning(encoder)
    assert got == may == {name for name, _ in encoder.named_parameters()}


def test_frozen(weights):
    encoder = built(weights, latents=2, tuning="frozen")
    assert learning(encoder) == ({"latents"}, {"latents"})
    assert encoder.training
    assert not encoder.backbone.training


def test_lora(weights):
    """Adapters start as no change, and nothing but them and the latent tokens is trained."""
    full, lora = built(weights, latents=2), built(weights, latents=2, tuning="lora")
    with torch.no_grad():
        assert_close(lora.eval()(images()), full.eval()(images()))
    got, may = learning(lora)
    assert got == may
    adapters = {name for name, _ in lora.named_parameters() if "lora_" in name}
    assert may == adapters | {"latents"}
    assert len(adapters) == 2 * 4 * 8  # A and B of qkv, proj, fc1, fc2 of 8 blocks


def test_lora_of_some_layers(weights):
    encoder = built(weights, tuning="lora", lora={"rank": 3, "alpha": 6, "layers": ["mlp.fc1"]})
    adapters = {name: p.shape for name, p in encoder.named_parameters() if p.requires_grad}
    assert len(adapters) == 16
    assert adapters["backbone.blocks.0.mlp.fc1.lora_A.default.weight"] == (3, 64)
    assert encoder.backbone.blocks[0].mlp.fc1.scaling == {"default": 2.0}
    with pytest.raises(UserError, match=r"^no linear layer of VisionTransformer has a name that ends in mlp\.fc3$"):
        built(weights, tuning="lora", lora={"layers": ["mlp.fc3"]})


def composed(weights, **changes):
    torch.manual_seed(2)
    return ComposedOptions(
        preprocessing=Preprocessing(image_size=64),
        encoder=TimmEncoderOptions(model=MODEL, weights=str(weights), image_size=64, latents=3, **changes),
        quantizer={"name": "signs", "dim": 4},
        decoder=TokenCNNDecoderOptions(
            width=12, tokens=3, grid=(8, 8), channels=32, multipliers=(1, 1, 1, 1), blocks=1
        ),
    ).build()


@pytest.mark.parametrize("tuning", ["full", "frozen", "lora"])
def test_a_step_of_training_saved_and_loaded(weights, tmp_path, tuning):
    """Adapters are there before optimizer and averages, move, are saved, and come back without the source."""
    path = tmp_path / "source.safetensors"
    path.write_bytes(weights[0].read_bytes())
    tokenizer = composed(path, tuning=tuning).train()
    before = {name: tensor.clone() for name, tensor in tokenizer.encoder.state_dict().items()}
    averaged = EMA(tokenizer, 0.9)
    optimizer = torch.optim.SGD([p for p in tokenizer.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # an adapter's second matrix is zero: the first one moves from the second step on
        output = tokenizer(images())
        (output.images.square().mean() + sum(output.losses.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
        averaged.update()
    moved = {name for name, tensor in tokenizer.encoder.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name, p in tokenizer.encoder.named_parameters() if p.requires_grad}
    tokenizer.eval().save_pretrained(tmp_path / "saved")
    path.unlink()
    loaded = Tokenizer.from_pretrained(tmp_path / "saved")
    assert loaded.options.encoder.tuning == tuning
    assert torch.equal(loaded.encode(images()), tokenizer.encode(images()))
    assert_close(loaded(images()).images, tokenizer(images()).images)


@pytest.mark.parametrize("model", ["vit_base_patch16_siglip_224", "eva02_tiny_patch14_224", "deit3_small_patch16_224"])
def test_every_weight_takes_part(model):
    """No heads that features do not need, which would wait for gradients under DDP."""
    encoder = TimmEncoderOptions(model=model, weights=None, image_size=112).build(3)
    size = 2 * encoder.patch
    encoder(images(size, size)).square().mean().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []


def test_one_graph_and_bfloat16(weights):
    encoder = built(weights, latents=2).eval()
    x = images()
    with torch.no_grad():
        plain = encoder(x)
        assert_close(torch.compile(encoder, fullgraph=True, backend="aot_eager")(x), plain)
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(encoder(x).float(), plain, rtol=0.1, atol=0.1)


def told(**changes):
    with pytest.raises(UserError) as error:
        TimmEncoderOptions(**{"model": MODEL, "weights": None, **changes}).build(changes.pop("channels", 3))
    return str(error.value)


def test_models_that_are_no_vit():
    assert told(model="nothing_of_the_kind") == "timm has no model called nothing_of_the_kind"
    for model in ("resnet18", "beit_base_patch16_224", "swin_tiny_patch4_window7_224"):
        assert told(model=model) == f"{model} is no ViT with one grid of patches, which the timm encoder needs"
    assert told(model="eva02_tiny_patch14_224", image_size=112, latents=3) == (
        "latent tokens need a plain ViT of timm, eva02_tiny_patch14_224 is another kind: set latents: null"
    )


def test_weights_of_another_model(weights):
    sentence = told(model="test_vit3", weights=str(weights[0]))
    assert sentence.startswith(f"the weights of {weights[0]} do not fit test_vit3: ")


def test_grey_images():
    with pytest.raises(UserError, match=r"^the timm encoder takes images of 3 channels, not 1$"):
        TimmEncoderOptions(model=MODEL, weights=None).build(1)


def test_wrong_options():
    with pytest.raises(ValidationError, match="tuning"):
        TimmEncoderOptions(model=MODEL, tuning="partly")


def test_the_extra_is_missing(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(pretrained.importlib, "import_module", missing)
    assert told() == "pretrained backbones need further packages: pip install 'smalti-core[pretrained]'"


def test_depth_anything_as_transformers_has_it(tmp_path):
    """Timm lacks it; its backbone is a DINOv2, which is found within the file."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "patch_size": 14, "image_size": 56}
    tower = transformers.Dinov2Model(transformers.Dinov2Config(**sizes, layerscale_value=0.5)).eval()
    tower.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = {f"backbone.{name}": tensor for name, tensor in load_file(path).items()}
    save_file({**whole, "head.conv1.weight": torch.ones(1)}, path)
    options = TimmEncoderOptions(model="vit_small_patch14_dinov2", weights=str(tmp_path), image_size=56)
    encoder = options.build(3).eval()
    x = images(56, 56)
    with torch.no_grad():
        expected = tower(((x + 1) / 2 - encoder.mean) / encoder.std).last_hidden_state[:, 1:]
        assert_close(encoder(x).flatten(1, 2), expected, rtol=1e-4, atol=1e-4)
