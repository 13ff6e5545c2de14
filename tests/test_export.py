"""Published weights that come in and go out again under the publisher's names: LlamaGen and VAR."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from smalti.core.checkpoints.importing import export_checkpoint, import_checkpoint
from smalti.core.contracts import Tokenizer
from smalti.core.errors import UserError
from smalti.core.testing import parity

CASES = Path(__file__).parent / "parity"
NETWORKS = {
    "name": "composed",
    "preprocessing": {"image_size": 8},
    "encoder": {"name": "vqgan", "width": 32, "multipliers": [1, 2], "blocks": 1},
    "decoder": {"name": "vqgan", "width": 32, "multipliers": [1, 2], "blocks": 2, "attention_levels": [-1]},
}


def llamagen(**changes):
    quantizer = {"name": "vq", "dim": 6, "codebook_size": 16, "cosine": True}
    return Tokenizer.from_config({"kind": "tokenizer", "options": {**NETWORKS, "quantizer": quantizer, **changes}})


def var(phi, kernel="convolution"):
    unit = {"name": "vq", "dim": 256, "codebook_size": 16}
    quantizer = {"name": "multi-scale", "quantizer": unit, "scales": [1, 2, 4], "phi": phi}
    options = {**NETWORKS, "quantizer": quantizer, "to_codes": kernel, "from_codes": kernel}
    return Tokenizer.from_config({"kind": "tokenizer", "options": options})


@pytest.mark.parametrize(
    ("case", "layout"),
    [("llamagen-vq-ds16", "llamagen-vq"), ("llamagen-vq-ds8", "llamagen-vq"), ("var-vqvae-ch160", "var-vqvae")],
)
def test_exports_exactly_the_published_entries(case, layout):
    published = parity.read_case(CASES / f"{case}.json.gz")["state_dict"]
    with torch.device("meta"):
        module = import_checkpoint({name: torch.empty(entry["shape"]) for name, entry in published.items()})
        exported = export_checkpoint(module, layout)
    assert {name: list(tensor.shape) for name, tensor in exported.items()} == {
        name: entry["shape"] for name, entry in published.items()
    }


@pytest.mark.parametrize(
    ("module", "layout", "overrides", "name"),
    [
        (llamagen, "llamagen-vq", [], "quant_conv.weight"),
        (lambda: var(0), "var-vqvae", [], "quant_conv.weight"),
        (lambda: var(1), "var-vqvae", [], "quantize.quant_resi.qresi.weight"),
        (lambda: var(2), "var-vqvae", [], "quantize.quant_resi.qresi_ls.1.weight"),
        (lambda: var(3), "var-vqvae", [], "quantize.quant_resi.2.weight"),
        (lambda: var(2, "linear"), "var-vqvae", [], "quant_conv.weight"),
    ],
    ids=["llamagen", "var-no-phi", "var-one-phi", "var-shared-phi", "var-own-phi", "var-1x1"],
)
def test_round_trip(module, layout, overrides, name):
    original = module().eval()
    exported = export_checkpoint(original, layout)
    assert name in exported
    if layout == "var-vqvae":
        overrides = ["quantizer.scales=[1, 2, 4]"]
    again = import_checkpoint(exported, overrides=["preprocessing.image_size=8", *overrides])
    wanted = original.state_dict()
    assert again.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in again.state_dict().items())
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(again.encode(images), original.encode(images))
    twice = export_checkpoint(again, layout)
    assert twice.keys() == exported.keys()
    assert all(torch.equal(tensor, exported[key]) for key, tensor in twice.items())


def test_weights_of_another_layout_cannot_be_exported():
    sentence = "this tokenizer cannot be written in the layout var-vqvae: its options have no scales"
    with pytest.raises(UserError, match=f"^{sentence}$"):
        export_checkpoint(llamagen(), "var-vqvae")


def test_weights_without_averages_may_be_vqgan_or_ibq():
    case = parity.read_case(CASES / "quant-ibq-tokenizer-16384-res2.json.gz")
    with torch.device("meta"):
        weights = {name: torch.empty(entry["shape"]) for name, entry in case["state_dict"].items()}
        with pytest.raises(UserError, match="may be of any of the layouts ibq, taming-vqgan: say which one"):
            import_checkpoint(weights)
        assert import_checkpoint(weights, "taming-vqgan").options.quantizer.name == "vq"
        assert import_checkpoint(weights, "ibq").options.quantizer.name == "ibq"


def test_a_weight_without_its_average_is_missing():
    case = parity.read_case(CASES / "quant-ibq-small-ema.json.gz")
    weights = parity.fill_state_dict(case["state_dict"], case["weight_seed"])
    del weights["model_ema.encoderconv_inbias"]
    with pytest.raises(
        UserError, match=r"not a whole checkpoint of the layout ibq: missing encoder\.trunk\.conv_in\.bias$"
    ):
        import_checkpoint(weights)
    import_checkpoint(weights, ema=False)


def test_options_that_no_file_would_tell_are_not_lost_silently():
    encoder = {**NETWORKS["encoder"], "attention_eps": 1e-5}
    sentence = (
        "this tokenizer cannot be written in the layout llamagen-vq: no file of it tells encoder.attention_eps, and an "
        "import would take another value"
    )
    with pytest.raises(UserError, match=sentence):
        export_checkpoint(llamagen(encoder=encoder), "llamagen-vq")
    encoder = {**NETWORKS["encoder"], "dropout": 0.1}
    assert export_checkpoint(llamagen(encoder=encoder), "llamagen-vq")
