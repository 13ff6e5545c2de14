"""VAR without a tokenizer: which layouts it takes, what it says, and its published files.

What it computes with a quantizer is tested beside the packages (`tests/test_var.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from smalti.core.checkpoints.importing import configured, export_checkpoint, import_checkpoint, recognised
from smalti.core.checkpoints.zoo import zoo
from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout
from smalti.core.sampling_settings import SamplingSettings
from smalti.generation.var import VAR, VAROptions
from smalti.generation.var_editing import inside_box, kept_positions

SCALES = TokenLayout.scales(((1, 1), (2, 2), (4, 3)), (16,))
MODELS = ("var-d16", "var-d20", "var-d24", "var-d30", "var-d36")
SMALL = {"layers": 2, "dim": 16, "heads": 2, "code_width": 4}


def test_it_takes_scales() -> None:
    options = VAROptions()
    assert options.supports(SCALES) is None
    assert options.supports(SCALES.model_copy(update={"vocab": (16, 8, 4)})) is None
    sentence = "it predicts one scale after the other, and a grid has none"
    assert options.supports(TokenLayout.grid(2, 2, (16,))) == sentence
    grown = VAROptions(growth={"first": 4, "end": 10})
    assert grown.supports(SCALES) == "growth begins with 4 scales, and there are 3"
    with pytest.raises(ValidationError, match="dim 30 must be a multiple of the number of heads"):
        VAROptions(dim=30, heads=4)


@pytest.mark.parametrize("name", MODELS)
def test_the_zoo_agrees_with_the_layout(load_case: Callable[[str], dict[str, Any]], name: str) -> None:
    model = zoo()[name]
    shapes = {key: tuple(entry["shape"]) for key, entry in load_case(f"{name}-layout")["state_dict"].items()}
    layout = recognised(shapes)
    assert layout.name == model.layout == "var"
    config = configured(layout, shapes, model.overrides)
    assert TokenLayout.model_validate(config["layout"]) == model.tokens
    assert config["options"]["heads"] == int(name[5:])


def build(**options: Any) -> VAR:
    torch.manual_seed(0)
    return VAROptions(**{**SMALL, **options}).build(SCALES, 5).eval()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("cosine", [False, True])
def test_files_come_in_and_go_out(shared: bool, cosine: bool) -> None:
    model = build(shared_modulation=shared, cosine_attention=cosine, heads=2 if cosine else 1)
    published = export_checkpoint(model, "var")
    assert published["lvl_1L"].tolist() == [[0, *[1] * 4, *[2] * 12]]
    assert published["attn_bias_for_masking"].shape == (1, 1, 17, 17)
    assert published["attn_bias_for_masking"].isinf().sum() == 1 * 16 + 4 * 12
    assert published["blocks.1.attn.zero_k_bias"].tolist() == [0.0] * 16
    shape = "layout.shape=[[1, 1], [2, 2], [4, 3]]"
    again = import_checkpoint(published, overrides=[shape])
    assert isinstance(again, VAR)
    assert again.options == model.options
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    trained = {f"trainer.var_wo_ddp.{name}": tensor for name, tensor in published.items()}
    trained["trainer.vae_local.quantize.embedding.weight"] = torch.zeros(16, 4)
    assert import_checkpoint(trained, overrides=[shape]).token_layout == SCALES
    with pytest.raises(UserError, match=r"inputs.positions is \(17, 16\), should be \(680, 16\)"):
        import_checkpoint(published)


def test_branches_are_those_of_the_tokenizer_beside_it() -> None:
    layout = SCALES.model_copy(update={"vocab": (8, 8)})
    model = VAROptions(**SMALL).build(layout, 5)
    published = {f"trainer.var_wo_ddp.{name}": tensor for name, tensor in export_checkpoint(model, "var").items()}
    published |= {f"trainer.vae_local.quantizes.{branch}.embedding.weight": torch.zeros(8, 2) for branch in range(2)}
    shape = "layout.shape=[[1, 1], [2, 2], [4, 3]]"
    assert import_checkpoint(published, overrides=[shape]).token_layout == layout
    assert recognised({name: tuple(tensor.shape) for name, tensor in published.items()}).name == "imagefolder-var"


def test_without_a_tokenizer_it_says_so() -> None:
    with pytest.raises(UserError, match="has no tokenizer yet"):
        build().loss(torch.zeros(1, 17, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))


def test_editing_without_labels_needs_the_null_class() -> None:
    mask = torch.ones(4, 3, dtype=torch.bool)
    with pytest.raises(UserError) as raised:
        build(label_dropout=0.0).edit(torch.zeros(1, 17, 1, dtype=torch.int64), mask, None, SamplingSettings())
    assert str(raised.value) == "editing without labels needs a generator trained with label_dropout above 0"


def test_growth_ends_after_it_starts() -> None:
    with pytest.raises(ValidationError, match="growth cannot end before it starts, at step 10"):
        VAROptions(growth={"start": 10, "end": 9})


def test_masks_of_editing() -> None:
    inside = inside_box(SCALES, 0.25, 0.3, 1.0, 0.7)
    assert inside.tolist() == [[False] * 3, *[[False, True, False]] * 3]
    # A single token is always kept; the scale of four sees halves.
    assert kept_positions(inside, SCALES)[:5].tolist() == [True, False, False, False, False]
    assert torch.equal(kept_positions(~inside, SCALES)[5:], ~inside.flatten())
    assert kept_positions(torch.ones(4, 3, dtype=torch.bool), SCALES).all()
    with pytest.raises(
        UserError, match=r"^the mask must be bool \(4, 3\), the grid of the last scale, got torch.int64"
    ):
        kept_positions(inside.long(), SCALES)
    with pytest.raises(UserError, match=r"^a box has 0 <= top < bottom <= 1 and 0 <= left < right <= 1, got \(0.5, 0,"):
        inside_box(SCALES, 0.5, 0, 0.5, 1)
    with pytest.raises(UserError, match=r"^a box holds at least one cell of the grid 4x3, got \(0.5, 0, 0.6, 1\)$"):
        inside_box(SCALES, 0.5, 0, 0.6, 1)
