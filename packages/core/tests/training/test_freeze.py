import pytest
import torch

from smalti.core.errors import UserError
from smalti.core.training.freeze import freeze


def test_frozen_parts_do_not_learn_and_stay_in_evaluation_mode(tokenizer):
    model = tokenizer()
    freeze(model, ("encoder", "quantizer", "to_codes.bias"))
    model.train()
    assert model.training
    assert model.decoder.training
    assert not any(module.training for part in (model.encoder, model.quantizer) for module in part.modules())
    learning = {name for name, weight in model.named_parameters() if weight.requires_grad}
    everything = {name for name, _ in model.named_parameters()}
    assert everything - learning == {"to_codes.bias", *(name for name in everything if name.startswith("encoder."))}
    output = model(torch.rand(2, 1, 8, 8))
    assert not output.losses
    model.eval()
    assert not model.decoder.training


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("encodr", "decoder, encoder, from_codes, quantizer, to_codes"),
        ("to_codes.scale", "to_codes.bias, to_codes.weight"),
        ("", "decoder, encoder, from_codes, quantizer, to_codes"),
    ],
)
def test_a_name_that_the_model_does_not_have(tokenizer, name, there):
    with pytest.raises(UserError) as raised:
        freeze(tokenizer(), ("encoder", name))
    assert (
        str(raised.value) == f"train.tokenizer.freeze: the recipe's tokenizer has no part {name!r}, there are {there}"
    )


def test_something_has_to_learn(tokenizer):
    with pytest.raises(UserError, match=r"^train.tokenizer.freeze: .* leave nothing to train$"):
        freeze(tokenizer(), ("encoder", "decoder", "to_codes", "from_codes"))
