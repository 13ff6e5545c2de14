import json

import pytest
import torch
from safetensors.torch import save_file

from smalti.core.checkpoints.importing import export_checkpoint, import_checkpoint
from smalti.core.contracts import Tokenizer
from smalti.core.data.loader import Batch
from smalti.core.errors import UserError
from smalti.core.training.freeze import freeze
from smalti.core.training.options import Start, TokenizerTraining
from smalti.core.training.start import load_start
from smalti.core.training.tasks import TokenizerTask

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


@pytest.fixture
def proxy(tmp_path):
    """A VQGAN whose decoder is the small TiTok's pixel decoder: as a published file, and as a folder of ours."""
    torch.manual_seed(1)
    shared = {key: value for key, value in PIXELS.items() if key != "name"}
    options = {
        "name": "composed",
        "preprocessing": {"image_size": 12},
        "encoder": {"name": "vqgan", **shared, "downsampling": "average", "last_kernel": 1},
        "quantizer": {"name": "vq", "dim": 9, "codebook_size": 7},
        "decoder": PIXELS,
        "to_codes": "none",
        "from_codes": "none",
    }
    proxy = Tokenizer.from_config({"kind": "tokenizer", "options": options}).eval()
    torch.save(export_checkpoint(proxy, "maskgit-vqgan"), tmp_path / "maskgit.bin")
    proxy.save_pretrained(tmp_path / "maskgit")
    return proxy


def pixel_parts(source):
    return [
        Start(source=str(source), part="decoder", into="decoder.head.decoder"),
        Start(source=str(source), part="quantizer.codebook", into="decoder.head.codebook"),
    ]


def gradients(task, tokenizer):
    """Names of the weights that one update's first objective moves."""
    tokenizer.train().zero_grad()
    batch = Batch(torch.rand(2, 3, 12, 12) * 2 - 1, torch.zeros(2, dtype=torch.int64), ["a", "b"])
    _, terms = next(task.objectives(task.models, batch, 0))
    torch.stack([*terms.values()]).sum().backward()
    return {name for name, weight in tokenizer.named_parameters() if weight.grad is not None}, terms


TRAINING = {"steps": 1, "batch_size": 2, "learning_rate": 1e-3}


def test_the_first_stage_learns_logits_and_makes_no_pixels(legacy, proxy, tmp_path):
    load_start(legacy, pixel_parts(tmp_path / "maskgit.bin"))
    freeze(legacy, ("decoder.head.decoder", "decoder.head.codebook"))
    loss = {"name": "proxy-codes", "tokenizer": str(tmp_path / "maskgit")}
    task = TokenizerTask(legacy, TokenizerTraining.model_validate({**TRAINING, "losses": [loss]}))
    decoded = []
    legacy.decoder.head.decoder.register_forward_hook(lambda *call: decoded.append(call))
    moved, terms = gradients(task, legacy)
    assert set(terms) == {"proxy-codes", "commitment", "codebook"}
    assert not decoded
    everything = {name for name, _ in legacy.named_parameters()}
    assert everything - moved == {
        name for name in everything if name.startswith(("decoder.head.decoder.", "decoder.head.codebook"))
    }
    assert legacy(torch.zeros(1, 3, 12, 12)).images.shape == (1, 3, 12, 12)
    assert decoded
    adversarial = {"discriminator": {"name": "patchgan", "width": 8, "layers": 1}}
    with pytest.raises(UserError, match=r"^proxy codes are learned without pixels: leave adversarial out, or take "):
        TokenizerTask(
            legacy, TokenizerTraining.model_validate({**TRAINING, "losses": [loss], "adversarial": adversarial})
        )


def test_the_second_stage_trains_the_decoder_from_the_first_and_a_vqgan(legacy, proxy, tmp_path):
    whole = export_checkpoint(legacy, "titok")
    torch.save(
        {name: tensor for name, tensor in whole.items() if not name.startswith("pixel_")}, tmp_path / "first.bin"
    )
    for source in (tmp_path / "maskgit", tmp_path / "maskgit.bin"):
        fresh = Tokenizer.from_config(legacy.config())
        load_start(fresh, [Start(source=str(tmp_path / "first.bin")), *pixel_parts(source)])
        wanted = legacy.state_dict() | {
            "decoder.head.codebook": proxy.quantizer.codebook,
            **{f"decoder.head.decoder.{name}": tensor for name, tensor in proxy.decoder.state_dict().items()},
        }
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in fresh.state_dict().items())
    freeze(fresh, ("encoder", "to_codes", "quantizer"))
    task = TokenizerTask(fresh, TokenizerTraining.model_validate({**TRAINING, "losses": [{"name": "l2"}]}))
    moved, terms = gradients(task, fresh)
    assert set(terms) == {"l2"}
    assert moved == {name for name, _ in fresh.named_parameters() if name.startswith(("from_codes.", "decoder."))}
    with pytest.raises(
        UserError, match=r"^train.tokenizer.start: .*first.bin has no part 'decoder.head.decoder', there "
    ):
        load_start(fresh, [Start(source=str(tmp_path / "first.bin"), part="decoder.head.decoder", into="decoder")])
    with pytest.raises(UserError, match=r"does not fit the recipe's tokenizer: it lacks decoder.head.codebook, "):
        load_start(fresh, str(tmp_path / "first.bin"))
