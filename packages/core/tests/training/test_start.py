import pytest
import torch
from torch import nn

from smalti.core.checkpoints import importing
from smalti.core.errors import UserError
from smalti.core.training.options import Start
from smalti.core.training.start import load_start


def test_from_a_folder_and_from_a_run(tokenizer, tmp_path):
    source, averaged = tokenizer(), {name: tensor + 1 for name, tensor in tokenizer().state_dict().items()}
    source.save_pretrained(tmp_path / "run" / "tokenizer", averaged)
    for folder in (tmp_path / "run", tmp_path / "run" / "tokenizer"):
        fresh = tokenizer()
        load_start(fresh, str(folder))
        assert all(torch.equal(tensor, averaged[name]) for name, tensor in fresh.state_dict().items())
        assert all(weight.requires_grad for weight in fresh.parameters())


def test_adapters_begin_beside_loaded_weights(tokenizer, tmp_path):
    source = tokenizer()
    source.save_pretrained(tmp_path / "saved")

    class Adapted(nn.Module):
        """As peft wraps a layer."""

        def __init__(self, layer):
            super().__init__()
            self.base_layer = nn.Linear(layer.in_features, layer.out_features)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, 2, bias=False)})

    fresh = tokenizer()
    fresh.to_codes = Adapted(fresh.to_codes)
    adapter = fresh.to_codes.lora_A["default"].weight.clone()
    load_start(fresh, str(tmp_path / "saved"))
    assert torch.equal(fresh.to_codes.base_layer.weight, source.to_codes.weight)
    assert torch.equal(fresh.to_codes.lora_A["default"].weight, adapter)


def test_what_does_not_fit(tokenizer, tmp_path):
    tokenizer(dim=6).save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError) as raised:
        load_start(tokenizer(), str(tmp_path / "saved"))
    assert str(raised.value) == (
        f"train.tokenizer.start: {tmp_path / 'saved'} does not fit the recipe's tokenizer: to_codes.weight is (6, 8), "
        "should be (4, 8); to_codes.bias is (6,), should be (4,); from_codes.weight is (8, 6), should be (8, 4)"
    )
    other = tokenizer()
    other.to_codes = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(UserError, match=r"it lacks to_codes.0.bias, to_codes.0.weight; it has to_codes.bias, to_codes"):
        load_start(other, str(tmp_path / "saved"))


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("nowhere", r"^train.tokenizer.start: nowhere is neither a folder here nor a hub name owner/repository, and"),
        ("file.pt", r"is of no known layout, it has 1 entries \(weight\)"),
    ],
)
def test_nothing_usable_there(tokenizer, tmp_path, monkeypatch, source, sentence):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "file.pt")
    with pytest.raises(UserError, match=sentence):
        load_start(tokenizer(), source)


def changed(model, by):
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(by)
    return model


def test_parts_begin_with_weights_of_their_own(tokenizer, tmp_path):
    changed(tokenizer(), 1).save_pretrained(tmp_path / "one")
    changed(tokenizer(), 2).save_pretrained(tmp_path / "other")
    fresh, whole = tokenizer(), tokenizer().state_dict()
    load_start(
        fresh,
        (
            Start(source=str(tmp_path / "one")),
            Start(source=str(tmp_path / "other"), part="from_codes", into="from_codes"),
            Start(source=str(tmp_path / "other"), part="decoder", into="decoder"),
        ),
    )
    for name, tensor in fresh.state_dict().items():
        by = 2 if name.startswith(("from_codes.", "decoder.")) else 1
        assert torch.equal(tensor, whole[name] + by), name


def test_what_no_start_fills_begins_at_random(tokenizer, tmp_path):
    changed(tokenizer(), 1).save_pretrained(tmp_path)
    fresh, whole = tokenizer(), tokenizer().state_dict()
    load_start(fresh, [Start(source=str(tmp_path), part="to_codes.bias", into="to_codes.bias")])
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, whole[name] + (name == "to_codes.bias")), name


def test_a_part_of_a_published_file(tokenizer, tmp_path, monkeypatch):
    published = changed(tokenizer(), 3)
    monkeypatch.setattr(importing, "import_checkpoint", lambda path: published)
    (tmp_path / "file.bin").touch()
    fresh = tokenizer()
    load_start(fresh, [Start(source=str(tmp_path / "file.bin"), part="decoder", into="decoder")])
    assert all(
        torch.equal(tensor, published.decoder.state_dict()[name]) for name, tensor in fresh.decoder.state_dict().items()
    )
    assert not torch.equal(fresh.to_codes.weight, published.to_codes.weight)


@pytest.mark.parametrize(
    ("part", "into", "sentence"),
    [
        (
            "decodr",
            "decoder",
            "{source} has no part 'decodr', there are decoder, encoder, from_codes, to_codes",
        ),
        (
            "to_codes",
            "to_codes.gain",
            "the recipe's tokenizer has no part 'to_codes.gain', there are to_codes.bias, to_codes.weight",
        ),
        (
            "from_codes",
            "to_codes",
            "{source} does not fit the recipe's tokenizer: to_codes.weight is (8, 4), should be (4, 8); "
            "to_codes.bias is (8,), should be (4,)",
        ),
        (
            "to_codes.bias",
            "to_codes",
            "{source} does not fit the recipe's tokenizer: it lacks to_codes.bias, to_codes.weight; "
            "it has to_codes too many",
        ),
    ],
)
def test_parts_that_are_not_there_or_do_not_fit(tokenizer, tmp_path, part, into, sentence):
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError) as raised:
        load_start(tokenizer(), [Start(source=str(tmp_path), part=part, into=into)])
    assert str(raised.value) == f"train.tokenizer.start: {sentence.format(source=tmp_path)}"
