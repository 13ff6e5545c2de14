import pytest
import torch
from torch import nn

from smalti.core.errors import UserError
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
