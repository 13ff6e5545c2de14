"""Published generators: what the zoo says of them, and files that come in and go out again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from smalti.core.checkpoints.importing import (
    configured,
    export_checkpoint,
    export_file,
    import_checkpoint,
    import_recognised,
    recognised,
)
from smalti.core.checkpoints.zoo import zoo
from smalti.core.contracts import Generator
from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout
from smalti.core.testing.parity import fill_state_dict
from smalti.generation.layouts.titok_maskgit import TiTokMaskGIT

Case = Callable[[str], dict[str, Any]]

MODELS = {
    "llamagen-gpt-b-256": ["llamagen-b-256", "llamagen-b-384"],
    "llamagen-gpt-l-layout": ["llamagen-l-256", "llamagen-l-384"],
    "llamagen-gpt-xl-layout": ["llamagen-xl-384"],
    "llamagen-gpt-xxl-layout": ["llamagen-xxl-384"],
    "llamagen-gpt-3b-layout": ["llamagen-3b-384"],
    "llamagen-gpt-t2i-xl-layout": ["llamagen-t2i-xl-256", "llamagen-t2i-xl-512"],
    "far-dual-b-layout": ["far-b-dual"],
    "far-dual-l-layout": ["far-l-dual"],
    "far-triple-b-layout": ["far-b-triple"],
    "far-triple-l-layout": ["far-l-triple"],
    "rar-b-layout": ["rar-b"],
    "rar-l-layout": ["rar-l"],
    "rar-xl-layout": ["rar-xl"],
    "rar-xxl-layout": ["rar-xxl"],
    "xqgan-robusttok-rar-b-layout": ["robusttok-rar-b"],
    "xqgan-robusttok-rar-l-layout": ["robusttok-rar-l"],
    "titok-generator-l32-layout": ["titok-generator-l32"],
    "titok-generator-b64-layout": ["titok-generator-b64"],
    "titok-generator-s128-layout": ["titok-generator-s128"],
}
SMALL = {
    "llamagen-gpt-small": ["heads=4", "layout.shape=[[8, 8]]"],
    "llamagen-gpt-t2i-small": ["heads=4", "layout.shape=[[4, 4]]"],
    "far-dual-small": ["heads=4", "layout.shape=[[8, 8]]"],
    "quant-openmagvit2-factorized-gpt-small": ["heads=4", "layout.shape=[[4, 4]]"],
    "quant-ibq-llama-small": ["heads=4", "layout.shape=[[4, 4]]"],
    "sejal1d-gpt-reduced": ["heads=8"],
    "titok-maskgit-uvit-reduced": ["heads=8"],
}
UNREAD = {
    "xqgan-robusttok-rar-d4": {
        "embeddings.weight": slice(4096, 4097),
        "pos_embed": (0, slice(258, None)),
        "target_aware_pos_embed": (0, [0, 1, *range(258, 1280)]),
        "timesteps_embeddings": (0, slice(257, None)),
    },
    "titok-maskgit-vit-reduced": {"model.embeddings.token_type_embeddings.weight": slice(None)},
}
"""Rows of tables that no model reads, or that are added to others: they go out as zeros."""


def weights_of(case: dict[str, Any]) -> dict[str, Tensor]:
    return fill_state_dict(case["state_dict"], case["weight_seed"])


@pytest.mark.parametrize(("case", "name"), [(case, name) for case, names in MODELS.items() for name in names])
def test_the_zoo_agrees_with_the_layout(load_case: Case, case: str, name: str) -> None:
    model = zoo()[name]
    shapes = {key: tuple(entry["shape"]) for key, entry in load_case(case)["state_dict"].items()}
    layout = recognised(shapes)
    assert layout.name == model.layout
    with torch.device("meta"):
        generator = Generator.from_config(configured(layout, shapes, model.overrides))
    assert generator.token_layout == model.tokens
    # what the publisher counts is rounded, FAR's published size is that of another count, RAR's has unused rows
    parameters = sum(weight.numel() for weight in generator.parameters())
    assert parameters == pytest.approx(model.parameters, rel=7e-3)


@pytest.mark.parametrize("name", SMALL)
def test_what_comes_in_goes_out_again(load_case: Case, tmp_path: Path, name: str) -> None:
    published = weights_of(load_case(name))
    module, layout = import_recognised(published, overrides=SMALL[name])
    exported = export_checkpoint(module, layout)
    assert exported.keys() == published.keys()
    assert all(torch.equal(exported[key], published[key]) for key in published)
    export_file(module, layout, tmp_path / "model.pt")
    again = import_checkpoint(tmp_path / "model.pt", overrides=SMALL[name])
    assert again.config() == module.config()
    assert all(torch.equal(one, other) for one, other in zip(again.parameters(), module.parameters(), strict=True))


@pytest.mark.parametrize("name", UNREAD)
def test_rows_that_are_not_read_go_out_as_zeros(load_case: Case, name: str) -> None:
    published = weights_of(load_case(name))
    module, layout = import_recognised(published)
    exported = export_checkpoint(module, layout)
    assert exported.keys() == published.keys()
    for key, rows in UNREAD[name].items():
        assert not exported[key][rows].any()
        published[key][rows] = 0
    summed = "model.embeddings.position_embeddings.weight"
    assert all(torch.equal(exported[key], published[key]) for key in published if key != summed)
    again = import_checkpoint(exported)
    assert all(torch.equal(one, other) for one, other in zip(again.parameters(), module.parameters(), strict=True))


def test_titok_tells_its_heads() -> None:
    published = {"model": {"generator": {"num_attention_heads": 8}, "vq_model": {}}}
    assert TiTokMaskGIT().overrides(published) == ["heads=8"]
    assert TiTokMaskGIT().overrides({}) == []


@pytest.mark.parametrize(
    "name", ["quant-openmagvit2-factorized-gpt-small", "quant-ibq-llama-small", "sejal1d-gpt-reduced"]
)
def test_the_tokenizer_beside_a_transformer_is_left_out(load_case: Case, name: str) -> None:
    published = weights_of(load_case(name))
    whole = {f"transformer.{key}": tensor for key, tensor in published.items()}
    whole |= {
        "first_stage_model.encoder.conv_in.weight": torch.zeros(3),
        "transformer.blocks.0.attn.mask": torch.ones(1),
    }
    one, other = (import_checkpoint(tensors, overrides=SMALL[name]) for tensors in (published, whole))
    assert all(torch.equal(*pair) for pair in zip(one.parameters(), other.parameters(), strict=True))


def test_what_only_running_needs_is_left_out(load_case: Case) -> None:
    published = weights_of(load_case("llamagen-gpt-small"))
    stray = {"freqs_cis": torch.zeros(3), "layers.0.attention.kv_cache.k_cache": torch.zeros(3)}
    assert isinstance(import_checkpoint(published | stray, overrides=SMALL["llamagen-gpt-small"]), Generator)


def test_grid_and_classes_can_be_given(load_case: Case) -> None:
    published = weights_of(load_case("sejal1d-gpt-reduced"))
    model = import_checkpoint(
        published, overrides=["classes=10", "heads=8", "layout.kind=grid", "layout.shape=[[8, 8]]"]
    )
    assert (model.classes, model.token_layout) == (10, TokenLayout.grid(8, 8, (4096,)))


def test_a_strange_feed_forward_is_told(load_case: Case) -> None:
    published = weights_of(load_case("llamagen-gpt-small"))
    for part, axis in (("w1", 0), ("w3", 0), ("w2", 1)):
        for layer in range(4):
            key = f"layers.{layer}.feed_forward.{part}.weight"
            published[key] = published[key].narrow(axis, 0, 300)
    with pytest.raises(UserError) as raised:
        import_checkpoint(published)
    assert str(raised.value) == "a feed-forward 300 wide does not follow from 8/3 of the width 192 rounded up"
