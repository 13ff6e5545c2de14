"""Attention, cache and blocks, against plain twins."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from smalti.core.layout import TokenLayout
from smalti.generation.ar import AROptions
from smalti.generation.attention import attend
from smalti.generation.cache import LayerCache, allocate
from smalti.generation.rotary import sequence_rotary
from smalti.generation.transformer import Block, RMSNorm, SwiGLU, Transformer

OPTIONS = AROptions(layers=2, dim=16, heads=2, ffn_multiple=8, dropout=0.0)


def plain_attention(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    attended = torch.zeros_like(query)
    new, seen = query.shape[1], key.shape[1]
    for position in range(new):
        end = seen - new + position + 1 if causal else seen
        scores = torch.einsum("bhd,bnhd->bhn", query[:, position], key[:, :end]) * query.shape[-1] ** -0.5
        attended[:, position] = torch.einsum("bhn,bnhd->bhd", scores.softmax(-1), value[:, :end])
    return attended


@pytest.mark.parametrize(
    ("new", "seen", "causal"),
    [(5, 5, True), (1, 5, True), (3, 5, True), (1, 1, True), (3, 5, False), (5, 3, False)],
)
def test_attention_is_the_plain_one_with_gradients(new: int, seen: int, causal: bool) -> None:
    torch.manual_seed(0)
    fast = [torch.randn(2, length, 3, 8).requires_grad_() for length in (new, seen, seen)]
    plain = [tensor.detach().clone().requires_grad_() for tensor in fast]
    weights = torch.randn(2, new, 3, 8)
    outputs = attend(*fast, causal=causal), plain_attention(*plain, causal=causal)
    torch.testing.assert_close(*outputs)
    for output in outputs:
        (output * weights).sum().backward()
    for one, other in zip(fast, plain, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_more_queries_than_positions_cannot_be_causal() -> None:
    with pytest.raises(AssertionError, match="3 queries cannot be the last of 2 positions"):
        attend(torch.zeros(1, 3, 1, 4), torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4), causal=True)


def test_the_cache_gives_what_was_stored_and_no_more() -> None:
    cache = LayerCache(2, 4, 3, 8, torch.float32, torch.device("cpu"))
    keys, values = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 3, 8)
    for start, end in ((0, 1), (1, 3), (3, 4)):
        stored = cache.append(keys[:, start:end], values[:, start:end])
        assert torch.equal(stored[0], keys[:, :end])
        assert torch.equal(stored[1], values[:, :end])
    with pytest.raises(AssertionError, match="the cache holds 4 positions, 5 are too many"):
        cache.append(keys[:, :1], values[:, :1])


def test_the_cache_has_the_dtype_of_the_computation() -> None:
    weight = torch.zeros(1)
    key = torch.zeros(1, 1, 1, 4)
    assert allocate(1, 1, 1, 1, 4, weight)[0].append(key, key)[0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert allocate(1, 1, 1, 1, 4, weight)[0].append(key, key)[0].dtype == torch.bfloat16


def test_rms_norm_is_the_plain_one_with_gradients() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(6)
    with torch.no_grad():
        norm.weight += torch.randn(6)
    fast = torch.randn(2, 3, 6).requires_grad_()
    plain = fast.detach().double().requires_grad_()
    expected = plain / (plain.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.detach().double()
    torch.testing.assert_close(norm(fast).double(), expected, rtol=1e-5, atol=1e-6)
    norm(fast).pow(3).sum().backward()
    expected.pow(3).sum().backward()
    torch.testing.assert_close(fast.grad.double(), plain.grad, rtol=1e-4, atol=1e-5)


def test_rms_norm_of_low_precision_is_computed_in_float32() -> None:
    torch.manual_seed(0)
    x = (100 * torch.randn(4, 64)).bfloat16()
    norm = RMSNorm(64)
    expected = norm(x.float()).bfloat16()
    assert torch.equal(norm.bfloat16()(x), expected)


def test_swiglu_is_the_plain_one() -> None:
    torch.manual_seed(0)
    ffn, x = SwiGLU(4, 6), torch.randn(2, 3, 4)
    gate, up = x @ ffn.gate.weight.T, x @ ffn.up.weight.T
    torch.testing.assert_close(ffn(x), (gate / (1 + (-gate).exp()) * up) @ ffn.down.weight.T)


@pytest.mark.parametrize(
    ("dim", "multiple", "width"), [(768, 256, 2048), (1280, 256, 3584), (3200, 256, 8704), (128, 32, 352)]
)
def test_width_of_the_feed_forward(dim: int, multiple: int, width: int) -> None:
    assert AROptions(dim=dim, heads=4, ffn_multiple=multiple).ffn_dim == width


@pytest.mark.parametrize("heads", [5, 8])
def test_heads_must_fit(heads: int) -> None:
    with pytest.raises(ValidationError) as raised:
        AROptions(dim=24, heads=heads)
    (error,) = raised.value.errors()
    assert error["loc"] == ("heads",)
    assert error["msg"] == "Value error, dim 24 must be a multiple of 4 times the number of heads"


@pytest.mark.parametrize("chunks", [(1, 1, 1, 1, 1, 1), (1, 3, 2), (4, 2)])
def test_cached_chunks_equal_the_whole(chunks: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    transformer = Transformer(OPTIONS, 2).eval()
    x, rotary = torch.randn(3, 6, 16), sequence_rotary(5, 8)
    whole = transformer(x, rotary)
    cache = transformer.new_cache(3, 6)
    start, parts = 0, []
    with torch.no_grad():
        for size in chunks:
            parts.append(transformer(x[:, start : start + size], rotary[start : start + size], cache))
            start += size
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-6)


def test_drop_path_leaves_out_whole_branches_per_sample() -> None:
    torch.manual_seed(0)
    block = Block(OPTIONS, drop_path=0.5)
    x, rotary = torch.randn(64, 3, 16), sequence_rotary(2, 8)
    attention = block.attention(block.attention_norm(x), rotary, None)
    outcomes = {}
    for first in (0, 1):
        h = x + 2 * first * attention
        for second in (0, 1):
            outcomes[first, second] = h + 2 * second * block.ffn(block.ffn_norm(h))
    trained = block.train()(x, rotary, None)
    found = Counter(
        kind
        for kind, outcome in outcomes.items()
        for one, other in zip(trained, outcome, strict=True)
        if torch.allclose(one, other, atol=1e-6)
    )
    assert sum(found.values()) == 64
    assert len(found) == 4
    torch.testing.assert_close(block.eval()(x, rotary, None), x + attention + block.ffn(block.ffn_norm(x + attention)))


def test_drop_path_rises_over_the_layers() -> None:
    transformer = Transformer(OPTIONS.model_copy(update={"drop_path": 0.3}), 4)
    assert [block.drop_path for block in transformer.blocks] == pytest.approx([0, 0.1, 0.2, 0.3])


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = AROptions(layers=2, dim=128, heads=4, ffn_multiple=32).build(TokenLayout.grid(4, 4, (512,)), 10)
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight)), name
        elif name == "output.weight":
            assert not weight.any()
        else:
            assert weight.std().item() == pytest.approx(0.02, rel=0.1), name
            assert abs(weight.mean().item()) < 2e-3, name
