"""Rules translate names both ways without touching a number."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.core.checkpoints.layout import count
from smalti.core.checkpoints.rules import Fused, Rename, to_ours, to_published

QKV = ("{side}.att.{index}.q.*", "{side}.att.{index}.k.*", "{side}.att.{index}.v.*")


def rules_for(levels):
    return [
        Rename("{side}.up.{level}.block.{index}.*", "{side}.levels.{level}.blocks.{index}.*", {"level": levels}),
        Rename("{side}.down.{level}.conv.*", "{side}.resampling.{level}.*"),
        Fused(QKV, "{side}.attention.{index}.qkv.*", pointwise=True),
        Rename("quant_conv.*", "to_codes.*", pointwise=True),
        Rename("latent_tokens", "latents", squeeze=2),
        Rename("*", "rest.*"),
    ]


@st.composite
def published(draw):
    """A state dict in the layout of `rules_for`, and its number of levels."""
    levels, blocks, width = (draw(st.integers(1, 4)) for _ in range(3))
    tensors = {"latent_tokens": torch.randn(1, 1, 3, width), "quant_conv.weight": torch.randn(2, width, 1, 1)}
    tensors["quant_conv.bias"] = torch.randn(2)
    for side in draw(st.sets(st.sampled_from(("encoder", "decoder")), min_size=1)):
        for level in range(levels):
            tensors[f"{side}.down.{level}.conv.weight"] = torch.randn(width, width, 3, 3)
            for block in range(blocks):
                tensors[f"{side}.up.{level}.block.{block}.conv1.weight"] = torch.randn(width, width, 3, 3)
        for block in range(blocks):
            for part in "qkv":
                tensors[f"{side}.att.{block}.{part}.weight"] = torch.randn(width, width, 1, 1)
                tensors[f"{side}.att.{block}.{part}.bias"] = torch.randn(width)
    for name in draw(st.lists(st.from_regex(r"extra\.[a-z]{1,3}", fullmatch=True), max_size=3)):
        tensors[name] = torch.tensor(draw(st.integers(-9, 9)))
    return levels, tensors


@settings(deadline=None, max_examples=25)
@given(published())
def test_there_and_back(case):
    levels, tensors = case
    rules = rules_for(levels)
    ours, unknown = to_ours(rules, tensors)
    assert unknown == []
    assert sum(tensor.numel() for tensor in ours.values()) == sum(tensor.numel() for tensor in tensors.values())
    back, homeless = to_published(rules, ours)
    assert homeless == []
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_where_things_go():
    rules = rules_for(3)
    first, second = torch.randn(2, 2, 3, 3), torch.randn(4, 2, 1, 1)
    queries, keys, values = torch.randn(3, 2, 2, 1, 1)
    tensors = {
        "encoder.up.0.block.1.conv1.weight": first,
        "quant_conv.weight": second,
        "encoder.att.0.q.weight": queries,
        "encoder.att.0.k.weight": keys,
        "encoder.att.0.v.weight": values,
    }
    ours, _ = to_ours(rules, tensors)
    assert torch.equal(ours["encoder.levels.2.blocks.1.conv1.weight"], first)
    assert torch.equal(ours["to_codes.weight"], second[:, :, 0, 0])
    assert torch.equal(ours["encoder.attention.0.qkv.weight"], torch.cat([queries, keys, values])[:, :, 0, 0])


def test_the_first_rule_wins():
    rules = [Rename("a.special", "ours.special"), Rename("a.*", "ours.all.*")]
    ours, _ = to_ours(rules, {"a.special": torch.zeros(1), "a.other": torch.ones(1)})
    assert sorted(ours) == ["ours.all.other", "ours.special"]


def test_what_no_rule_takes():
    rules = [Rename("up.{level}.*", "levels.{level}.*", {"level": 2})]
    tensors = {"up.first.weight": torch.zeros(1), "up.1.weight": torch.ones(1), "down.0.weight": torch.ones(1)}
    ours, unknown = to_ours(rules, tensors)
    assert list(ours) == ["levels.0.weight"]
    assert unknown == ["down.0.weight", "up.first.weight"]


def test_an_incomplete_group_goes_nowhere():
    rules = [Fused(("q.*", "k.*", "v.*"), "qkv.*")]
    ours, unknown = to_ours(rules, {"q.weight": torch.ones(2), "v.weight": torch.ones(2)})
    assert (ours, unknown) == ({}, [])


def test_a_wide_kernel_is_no_linear_layer():
    ours, _ = to_ours([Rename("a.*", "b.*", pointwise=True)], {"a.weight": torch.ones(2, 2, 3, 3)})
    assert ours["b.weight"].shape == (2, 2, 3, 3)


@pytest.mark.parametrize(
    ("pattern", "expected"), [("encoder.down.{}.", 2), ("encoder.down.{}.attn", 1), ("decoder.up.{}.", 0)]
)
def test_counting(pattern, expected):
    names = ("0.block.weight", "1.attn.weight", "1.block.weight", "x.block.weight")
    assert count({f"encoder.down.{name}": (1,) for name in names}, pattern) == expected
