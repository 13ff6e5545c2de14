import json

import pytest
import torch
from safetensors.torch import save_file

from smalti.core.checkpoints.importing import export_checkpoint, import_checkpoint
from smalti.core.contracts import Tokenizer
from smalti.core.errors import UserError

TINY = {
    "name": "titok",
    "width": 128,
    "layers": 2,
    "heads": 2,
    "mlp_width": 256,
    "grid": [6, 6],
    "tokens": 5,
}
PIXELS = {
    "name": "vqgan",
    "width": 32,
    "multipliers": [1, 2],
    "blocks": 2,
    "latent_width": 9,
    "attention_levels": [],
    "middle_attention": False,
    "bias": False,
    "shortcut": "output",
    "image_range": "unit",
}


@pytest.fixture
def legacy():
    """A small TiTok of the first kind, whose search is not the published one."""
    torch.manual_seed(0)
    options = {
        "name": "composed",
        "preprocessing": {"image_size": 12},
        "encoder": TINY | {"patch": 2, "reread": True, "image_range": "unit"},
        "quantizer": {"name": "vq", "dim": 3, "codebook_size": 11, "commitment_weight": 0.5},
        "decoder": TINY | {"head": {"name": "proxy", "codes": 7, "decoder": PIXELS}},
    }
    return Tokenizer.from_config({"kind": "tokenizer", "options": options}).eval()


def hub_folder(folder, tokenizer):
    save_file(export_checkpoint(tokenizer, "titok"), folder / "model.safetensors")
    model = {"quantize_mode": "vq", "use_l2_norm": False, "commitment_cost": 0.5, "is_legacy": True}
    (folder / "config.json").write_text(json.dumps({"model": {"vq_model": model}}))
    return folder


def test_a_hub_folder_with_its_configuration(legacy, tmp_path):
    images = torch.rand(2, 3, 12, 12) * 2 - 1
    loaded = import_checkpoint(hub_folder(tmp_path, legacy))
    assert (loaded.options.quantizer.cosine, loaded.options.quantizer.commitment_weight) == (False, 0.5)
    assert loaded.options.model_dump() == legacy.options.model_dump()
    assert torch.equal(loaded.encode(images), legacy.encode(images))
    assert torch.equal(loaded.decode(loaded.encode(images)), legacy.decode(legacy.encode(images)))


def test_without_its_configuration_the_published_search_is_taken(legacy, tmp_path):
    folder = hub_folder(tmp_path, legacy)
    (folder / "config.json").unlink()
    assert import_checkpoint(folder).options.quantizer.cosine
    assert not import_checkpoint(folder, overrides=["quantizer.cosine=false"]).options.quantizer.cosine


def test_the_first_stage_gives_the_same_tokens_and_logits(legacy):
    images = torch.rand(2, 3, 12, 12) * 2 - 1
    whole = export_checkpoint(legacy, "titok")
    first = {name: tensor for name, tensor in whole.items() if not name.startswith("pixel_")}
    loaded = import_checkpoint(first, overrides=["quantizer.cosine=false"])
    assert loaded.options.decoder.head.name == "logits"
    tokens = loaded.encode(images)
    assert torch.equal(tokens, legacy.encode(images))
    latent = legacy.from_codes(legacy.quantizer.decode(tokens, (5,)))
    logits = [model.decoder.head.logits(model.decoder.grid(latent)) for model in (loaded, legacy)]
    assert torch.equal(*logits)
    with pytest.raises(UserError, match=r"^this decoder ends in logits over proxy codes"):
        loaded.decode(tokens)
    exported = export_checkpoint(loaded, "titok")
    assert exported.keys() == first.keys()
    assert all(torch.equal(exported[name], first[name]) for name in first)
