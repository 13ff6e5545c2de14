import json

import pytest
import torch
from torch import nn

from smalti.core import weights
from smalti.core.contracts import Generator, Tokenizer
from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout
from smalti.core.recipe import load_recipe
from smalti.core.weights import fingerprint, load_tensors, save_tensors


@pytest.fixture
def tokenizer(recipe):
    torch.manual_seed(0)
    return load_recipe(recipe).tokenizer.build()


@pytest.fixture
def saved(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def told(cls, name, **options):
    with pytest.raises(UserError) as caught:
        cls.from_pretrained(name, **options)
    return str(caught.value)


def test_averaged_weights_lie_beside_and_are_preferred(tokenizer, tmp_path):
    averaged = {name: tensor * 2 for name, tensor in tokenizer.state_dict().items()}
    tokenizer.save_pretrained(tmp_path / "both", averaged)
    name = "encoder.layers.0.weight"
    assert torch.equal(Tokenizer.from_pretrained(tmp_path / "both").state_dict()[name], averaged[name])
    plain = Tokenizer.from_pretrained(tmp_path / "both", ema=False)
    assert torch.equal(plain.state_dict()[name], tokenizer.state_dict()[name])
    plain.save_pretrained(tmp_path / "both")  # older averages would go before these weights
    again = Tokenizer.from_pretrained(tmp_path / "both")
    assert torch.equal(again.state_dict()[name], tokenizer.state_dict()[name])


def test_same_weights_same_bytes(tokenizer, saved, tmp_path):
    tokenizer.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_damaged_and_missing_files(saved):
    file = saved / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert told(Tokenizer, saved).startswith(f"{file} is damaged or not a safetensors file: ")
    file.unlink()
    assert told(Tokenizer, saved) == f"{file} does not exist; expected the weights there"
    (saved / "config.json").write_text("{")
    assert "config.json is damaged, expected the configuration of a tokenizer" in told(Tokenizer, saved)


def test_foreign_weights_are_named(tokenizer, saved):
    state = tokenizer.state_dict()
    state["stranger"] = state.pop("to_codes.bias")
    state["to_codes.weight"] = torch.zeros(5, 8)
    save_tensors(saved / "model.safetensors", state)
    assert told(Tokenizer, saved) == (
        f"{saved / 'model.safetensors'} does not fit the configured ComposedTokenizer: missing to_codes.bias; "
        "not of this model stranger; to_codes.weight is (5, 8), should be (4, 8)"
    )


def test_a_folder_of_another_kind(saved):
    assert told(Generator, saved) == f"{saved} does not hold a generator, its config.json says kind 'tokenizer'"


def test_a_configuration_of_something_not_installed(saved):
    config = (saved / "config.json").read_text().replace('"composed"', '"mosaic"')
    (saved / "config.json").write_text(config)
    assert told(Tokenizer, saved).startswith(
        f"{saved}/config.json: the configuration cannot be used: options: unknown tokenizer 'mosaic'; installed: "
    )


def test_neither_folder_nor_hub_name(tmp_path):
    assert told(Tokenizer, tmp_path / "no" / "such" / "folder").endswith(
        "is neither a folder here nor a hub name of the form owner/repository"
    )


def test_the_hub_by_name(saved, monkeypatch):
    """The hub's client is asked for configuration and weights, and a failure is a sentence."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def download(name, **options):
        asked.append((name, options["revision"], options["allow_patterns"]))
        if name == "somebody/missing":
            raise LocalEntryNotFoundError("offline")
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loaded = Tokenizer.from_pretrained("somebody/tokenizer", revision="v1")
    assert loaded.options.name == "composed"
    assert asked == [("somebody/tokenizer", "v1", ["*.json", "*.safetensors"])]
    assert told(Tokenizer, "somebody/missing").startswith(
        "somebody/missing is not a folder here and could not be had from the hub (LocalEntryNotFoundError); "
    )


def test_push_to_hub_uploads_what_save_writes(tokenizer, monkeypatch):
    import huggingface_hub

    calls = []

    class Api:
        def create_repo(self, name, **options):
            calls.append(("create", name, options))

        def upload_folder(self, *, repo_id, folder_path):
            names = sorted(path.name for path in weights.Path(folder_path).iterdir())
            calls.append(("upload", repo_id, names))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    tokenizer.push_to_hub("me/mine", private=True)
    assert calls == [
        ("create", "me/mine", {"private": True, "exist_ok": True}),
        ("upload", "me/mine", ["config.json", "model.safetensors"]),
    ]


def test_generators_keep_layout_and_classes(recipe, tmp_path):
    layout = TokenLayout.sequence(6, (16,))
    load_recipe(recipe).generator.build(layout, 3).save_pretrained(tmp_path / "generator")
    loaded = Generator.from_pretrained(tmp_path / "generator")
    assert (loaded.token_layout, loaded.classes) == (layout, 3)


def test_fingerprints_tell_weights_and_configurations_apart(tokenizer):
    first = fingerprint(tokenizer, tokenizer.config())
    assert first == fingerprint(tokenizer, tokenizer.config())
    with torch.no_grad():
        tokenizer.to_codes.bias[0] += 1e-6
    assert first != fingerprint(tokenizer, tokenizer.config())
    assert fingerprint(tokenizer, {"a": 1}) != fingerprint(tokenizer, {"a": 2})


def test_shared_storage_is_saved_per_name(tmp_path):
    tied = nn.ModuleDict({"a": nn.Linear(2, 2)})
    tied["b"] = tied["a"]
    save_tensors(tmp_path / "tied.safetensors", tied.state_dict())
    load_tensors(tied, tmp_path / "tied.safetensors")


def test_configurations_that_cannot_be_built(saved):
    path = saved / "config.json"
    whole = json.loads(path.read_text())

    def changed(part, option, value):
        content = json.loads(json.dumps(whole))
        content["options"][part][option] = value
        path.write_text(json.dumps(content))
        return told(Tokenizer, saved)

    assert changed("encoder", "groups", 3).startswith(f"{path}: ")
    assert changed("encoder", "blocks", 10**12).startswith(f"{path}: it asks for a ")
    assert changed("encoder", "widths", [10**6, 10**6]).startswith(f"{path}: it asks for a ")
    assert changed("decoder", "widths", [8, 10**15]).startswith(f"no tokenizer can be built as {path} says: ")


def test_no_memory_is_taken_for_a_tensor_far_larger_than_the_weights(recipe, tmp_path):
    generator = load_recipe(recipe).generator.build(TokenLayout.sequence(6, (16,)), 3)
    generator.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"classes": 10**6}))
    assert told(Generator, tmp_path) == (
        f"{path}: it asks for a tensor (1000000, 6, 16) far beyond what the weights beside it fill"
    )
