"""Weights of pretrained ViTs: where they come from, and what becomes of them among our blocks."""

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from timm.models import VisionTransformer
from torch import nn
from torch.testing import assert_close
from transformers import Dinov2Config, Dinov2Model

from smalti.core.backbones import pretrained
from smalti.core.backbones.positions import resampled
from smalti.core.backbones.pretrained import image_statistics, load_vit, part
from smalti.core.backbones.vit_block import ViTBlock
from smalti.core.errors import UserError

SIZES = {"width": 16, "depth": 2, "patch_size": 8, "grid": (4, 4)}


def timm_vit(**changes):
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = VisionTransformer(**{**options, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # LayerScale and biases start too small to be seen
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def saved(model, path):
    save_file(model.state_dict(), path)
    return str(path)


def told(source, **changes):
    with pytest.raises(UserError) as error:
        load_vit(str(source), **{**SIZES, **changes})
    return str(error.value)


@pytest.mark.parametrize("layer_scale", [None, 0.1])
def test_blocks_compute_what_timm_computes(tmp_path, layer_scale):
    model = timm_vit(init_values=layer_scale)
    weights = load_vit(saved(model, tmp_path / "vit.safetensors"), **SIZES)
    blocks = nn.ModuleList(ViTBlock(16, 2, eps=1e-6, layer_scale=layer_scale) for _ in range(2))
    blocks.load_state_dict(part(weights, "blocks"))
    x = torch.randn(2, 5, 16)
    ours = x
    for block in blocks:
        ours = block(ours)
    assert_close(ours, model.blocks(x))


def test_everything_has_its_place(tmp_path):
    model = timm_vit(pre_norm=True, reg_tokens=3, class_token=True, init_values=0.1)
    weights = load_vit(saved(model, tmp_path / "vit.safetensors"), **SIZES)
    assert_close(weights["registers"], model.reg_token.data + model.pos_embed.data[:, 1:4])
    assert_close(weights["positions"], model.pos_embed.data[:, [0, *range(4, 20)]])
    assert_close(weights["class_token"], model.cls_token.data)
    assert_close(weights["norm_pre.weight"], model.norm_pre.weight.data)
    assert_close(weights["norm.bias"], model.norm.bias.data)
    assert "patch.bias" not in weights  # a ViT that normalises first has none
    assert set(part(weights, "patch")) == {"weight"}


@pytest.mark.parametrize("no_embed_class", [True, False])
def test_positions_begin_with_the_class_token(tmp_path, no_embed_class):
    model = timm_vit(no_embed_class=no_embed_class, reg_tokens=3 if no_embed_class else 0)
    positions = load_vit(saved(model, tmp_path / "vit.safetensors"), **SIZES)["positions"]
    assert positions.shape == (1, 17, 16)
    expected = model.pos_embed.data
    if no_embed_class:
        expected = torch.cat([torch.zeros(1, 1, 16), expected], dim=1)
    assert_close(positions, expected)


def test_patches_and_positions_are_resampled(tmp_path):
    """Images twice as large with patches twice as large give the same patch vectors."""
    model = timm_vit()
    weights = load_vit(saved(model, tmp_path / "vit.safetensors"), **{**SIZES, "patch_size": 16, "grid": (2, 6)})
    assert_close(weights["positions"], resampled(model.pos_embed.data, (2, 6), prefix=1))
    image = torch.randn(1, 3, 8, 8)
    larger = nn.functional.interpolate(image, scale_factor=2, mode="bicubic", antialias=True)
    small = nn.functional.conv2d(image, model.patch_embed.proj.weight)
    assert_close(nn.functional.conv2d(larger, weights["patch.weight"]), small, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prefix", ["pretrained.", "visual.trunk.", "backbone."])
def test_files_that_hold_more_than_the_backbone(tmp_path, prefix):
    model = timm_vit()
    bare = load_vit(saved(model, tmp_path / "bare.safetensors"), **SIZES)
    wrapped = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save({"model": wrapped | {"depth_head.weight": torch.ones(1)}}, tmp_path / "wrapped.pth")
    found = load_vit(str(tmp_path / "wrapped.pth"), **SIZES)
    assert found.keys() == bare.keys()
    assert all(torch.equal(found[name], bare[name]) for name in bare)


def test_a_folder(tmp_path):
    saved(timm_vit(), tmp_path / "model.safetensors")
    assert load_vit(str(tmp_path), **SIZES)["positions"].shape == (1, 17, 16)


def test_dinov2_of_transformers(tmp_path):
    """The features of the patches are the same through our blocks."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, mlp_ratio=4, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
        layerscale_value=0.5,
    )  # fmt: skip
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    published = load_file(tmp_path / "model.safetensors")  # not the names within the module
    save_file({f"backbone.{name}": tensor for name, tensor in published.items()}, tmp_path / "model.safetensors")
    weights = load_vit(str(tmp_path), **SIZES)
    blocks = nn.Sequential(*(ViTBlock(16, 2, eps=1e-6, layer_scale=0.5) for _ in range(2)))
    blocks.load_state_dict(part(weights, "blocks"))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        patches = nn.functional.conv2d(images, weights["patch.weight"], weights["patch.bias"], stride=8)
        tokens = torch.cat([weights["class_token"].expand(2, -1, -1), patches.flatten(2).transpose(1, 2)], dim=1)
        tokens = blocks(tokens + weights["positions"])
        ours = nn.functional.layer_norm(tokens, (16,), weights["norm.weight"], weights["norm.bias"], 1e-6)
        assert_close(ours, model(images).last_hidden_state)


def test_another_size(tmp_path):
    path = saved(timm_vit(), tmp_path / "vit.safetensors")
    assert told(path, depth=3) == f"{path} has 2 blocks of width 16, but 3 blocks of width 16 shall start from it"


def test_other_blocks(tmp_path):
    path = saved(timm_vit(qk_norm=True), tmp_path / "vit.safetensors")
    assert told(path) == (f"{path} cannot start a transformer of plain ViT blocks: it has blocks.0.attn.k_norm.bias")


def test_positions_of_no_square_grid(tmp_path):
    path = saved(timm_vit(img_size=(32, 24)), tmp_path / "vit.safetensors")
    assert told(path) == f"{path} cannot start ViT blocks: its 13 positions are of no square grid"


def test_no_vit_at_all(tmp_path):
    save_file({"norm.weight": torch.ones(3)}, tmp_path / "x.safetensors")
    assert told(tmp_path / "x.safetensors").endswith(
        "cannot start a transformer of plain ViT blocks: it lacks patch.weight"
    )


def test_a_path_that_is_not_there(tmp_path):
    path = tmp_path / "depth_anything_v2_vitb.pth"
    assert told(path) == f"{path} does not exist; expected the weights of a pretrained ViT there"


def test_a_damaged_file(tmp_path):
    path = tmp_path / "vit.pth"
    path.write_bytes(b"no weights")
    assert told(path) == f"{path} is damaged or not a checkpoint of torch.save or safetensors"


def test_an_unknown_name():
    assert told("vit_base_patch16_224.maee") == (
        "timm has no pretrained weights called vit_base_patch16_224.maee; the nearest name is vit_base_patch16_224.mae"
    )


@pytest.fixture
def hub(monkeypatch):
    """A hub that cannot be reached; the repositories and files that were asked for."""
    asked = []

    def download(repository, name, local_files_only):
        asked.append((repository, name, local_files_only))
        if " " in repository:
            raise HFValidationError(repository)
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_timm_names_are_hub_repositories(hub):
    """First the cache, then the network, once."""
    repository = "timm/vit_base_patch16_224.mae"
    assert told("vit_base_patch16_224.mae") == (
        f"{repository} is not in the hub's cache and could not be fetched: download "
        f"https://huggingface.co/{repository}/resolve/main/model.safetensors "
        "and give the path of that file instead of the name"
    )
    files = [("model.safetensors", True), ("pytorch_model.bin", True), ("model.safetensors", False)]
    assert hub == [(repository, *file) for file in files]


def test_hub_repositories(hub):
    assert told("depth-anything/Depth-Anything-V2-Base-hf").startswith(
        "depth-anything/Depth-Anything-V2-Base-hf is not in the hub's cache and could not be fetched: download "
    )
    assert told("a b/c") == "a b/c is neither a path here nor a hub name of the form owner/name"


def test_repositories_with_a_pickle_only(tmp_path, monkeypatch):
    torch.save(timm_vit().state_dict(), tmp_path / "pytorch_model.bin")

    def download(repository, name, local_files_only):
        if local_files_only:
            raise LocalEntryNotFoundError("not in the cache")
        if name != "pytorch_model.bin":
            raise EntryNotFoundError(name)
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert load_vit("somebody/vit", **SIZES)["positions"].shape == (1, 17, 16)


def test_statistics_of_images():
    clip = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    assert image_statistics("vit_base_patch16_clip_224.dfn2b") == clip
    assert image_statistics("depth-anything/Depth-Anything-V2-Base-hf") == pretrained.IMAGENET


def test_the_extra_is_missing(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(pretrained.importlib, "import_module", missing)
    assert told("vit_base_patch16_224.mae") == (
        "pretrained backbones need further packages: pip install 'smalti-core[pretrained]'"
    )
