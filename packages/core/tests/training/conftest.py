import pytest
import torch
from safetensors.torch import save_file

from smalti.core.contracts import TokenizerOutput
from smalti.core.losses.lpips import LPIPSDistance
from smalti.core.losses.vgg import VGG16
from smalti.core.plugins import registry


@pytest.fixture
def output():
    """What a tokenizer gives, from reconstructions and features."""

    def output(images, **features):
        return TokenizerOutput(images, torch.zeros(len(images), 1, 1, dtype=torch.int64), {}, features)

    return output


@pytest.fixture
def tokenizer():
    """Composed tokenizers of the toy quantizer, for 8 x 8 images, 2 x 2 tokens of `dim` bits."""

    def tokenizer(channels=1, dim=4):
        torch.manual_seed(0)
        options = registry().options("tokenizer", "composed")
        return options.model_validate(
            {
                "preprocessing": {"image_size": 8, "channels": channels, "fit": "pad"},
                "encoder": {"name": "cnn", "widths": [8, 8], "blocks": 1, "groups": 2},
                "quantizer": {"name": "signs", "dim": dim},
                "decoder": {"name": "cnn", "widths": [8, 8], "blocks": 1, "groups": 2},
            }
        ).build()

    return tokenizer


@pytest.fixture
def autoencoder(tokenizer):
    """Autoencoders of the networks of `tokenizer`."""

    def autoencoder():
        parts = tokenizer().config()["options"]
        options = registry().options("autoencoder", "composed")
        networks = {name: parts[name] for name in ("preprocessing", "encoder", "decoder")}
        torch.manual_seed(0)
        return options.model_validate({**networks, "width": 4}).build()

    return autoencoder


@pytest.fixture(scope="session")
def lpips_file(tmp_path_factory):
    """Seeded weights of VGG16 and heads, in the layout of LPIPS."""
    torch.manual_seed(0)
    distance = LPIPSDistance(VGG16())
    tensors = {f"net.slice1.{name[len('network.features.'):]}": tensor for name, tensor in distance.state_dict().items()
               if name.startswith("network.")}  # fmt: skip
    tensors |= {f"lin{n}.model.1.weight": head.weight.detach().abs() for n, head in enumerate(distance.heads)}
    path = tmp_path_factory.mktemp("lpips") / "lpips.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture(scope="session")
def vit_file(tmp_path_factory):
    """Seeded weights of a vision transformer in timm's names: width 64, 3 blocks, patches of 8, images of 32."""
    torch.manual_seed(0)
    width = 64
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 17, width),
        "patch_embed.proj.weight": (width, 3, 8, 8),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for block in range(3):
        for part, shape in (
            ("norm1.weight", (width,)), ("norm1.bias", (width,)), ("norm2.weight", (width,)), ("norm2.bias", (width,)),
            ("attn.qkv.weight", (3 * width, width)), ("attn.qkv.bias", (3 * width,)),
            ("attn.proj.weight", (width, width)), ("attn.proj.bias", (width,)),
            ("mlp.fc1.weight", (4 * width, width)), ("mlp.fc1.bias", (4 * width,)),
            ("mlp.fc2.weight", (width, 4 * width)), ("mlp.fc2.bias", (width,)),
        ):  # fmt: skip
            shapes[f"blocks.{block}.{part}"] = shape
    tensors = {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}
    path = tmp_path_factory.mktemp("vit") / "vit.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """Torch hub's cache with nothing in it."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"
