"""Cache, blocks and transformer, against plain twins."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from smalti.core.layout import TokenLayout
from smalti.generation.ar import AROptions
from smalti.generation.blocks import Architecture, Block, FeedForward
from smalti.generation.cache import Cache
from smalti.generation.norms import ModulatedNorm, RMSNorm
from smalti.generation.rotary import sequence_rotary
from smalti.generation.transformer import Transformer, initialise_modulation

LLAMA = Architecture(layers=2, dim=16, heads=2, ffn_dim=48)
ARCHITECTURES = [
    LLAMA,
    replace(LLAMA, norm="layer", norm_eps=1e-6, ffn="gelu", bias=True, qkv_bias="all", query_key_norm="layer",
            modulation="block", condition_dim=5),
    replace(LLAMA, norm="plain-layer", ffn="gelu-tanh", bias=True, qkv_bias="query-value", query_key_norm="cosine",
            modulation="shared", condition_dim=5),
]  # fmt: skip


def test_the_cache_gives_what_was_stored_and_no_more() -> None:
    cache = Cache(1, 2, 3, 4, 8, torch.zeros(1))
    (layer,) = cache.layers
    keys, values = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 8)
    for start, end in ((0, 1), (1, 3), (3, 4)):
        stored = layer.append(keys[:, :, start:end], values[:, :, start:end])
        assert torch.equal(stored[0], keys[:, :, :end])
        assert torch.equal(stored[1], values[:, :, :end])
        assert cache.length == end
    with pytest.raises(AssertionError, match="the cache holds 4 positions, 5 are too many"):
        layer.append(keys[:, :, :1], values[:, :, :1])
    memory = stored[0].data_ptr()
    cache.clear()
    assert cache.length == 0
    assert layer.append(keys[:, :, :1], values[:, :, :1])[0].data_ptr() == memory


def test_the_cache_has_the_dtype_of_the_computation() -> None:
    weight = torch.zeros(1)
    key = torch.zeros(1, 1, 1, 4)
    assert Cache(1, 1, 1, 1, 4, weight).layers[0].append(key, key)[0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert Cache(1, 1, 1, 1, 4, weight).layers[0].append(key, key)[0].dtype == torch.bfloat16


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
    ffn, x = FeedForward(Architecture(1, 4, 1, 6)), torch.randn(2, 3, 4)
    gate, up = (x @ weight.T for weight in ffn.up.weight.chunk(2))
    torch.testing.assert_close(ffn(x), (gate / (1 + (-gate).exp()) * up) @ ffn.down.weight.T)


@pytest.mark.parametrize("kind", ["gelu", "gelu-tanh"])
def test_gelu_is_the_plain_one(kind: str) -> None:
    torch.manual_seed(0)
    ffn, x = FeedForward(Architecture(1, 4, 1, 6, ffn=kind, bias=True)), torch.randn(2, 3, 4)
    inner = x @ ffn.up.weight.T + ffn.up.bias
    factor = (
        (1 + torch.erf(inner / 2**0.5)) / 2 if kind == "gelu"
        else (1 + torch.tanh((2 / torch.pi) ** 0.5 * (inner + 0.044715 * inner**3))) / 2
    )  # fmt: skip
    torch.testing.assert_close(ffn(x), (inner * factor) @ ffn.down.weight.T + ffn.down.bias)


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
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.query_key_norm)
def test_cached_chunks_equal_the_whole(chunks: tuple[int, ...], architecture: Architecture) -> None:
    torch.manual_seed(0)
    transformer = Transformer(architecture).eval()
    x, rotary = torch.randn(3, 6, 16), sequence_rotary(6, 8)
    modulations = transformer.modulations(torch.randn(3, 1, 5))
    whole = transformer(x, rotary=rotary, modulations=modulations)
    cache = transformer.new_cache(3, 6)
    start, parts = 0, []
    with torch.no_grad():
        for size in chunks:
            rows = slice(start, start + size)
            parts.append(transformer(x[:, rows], rotary=rotary[rows], cache=cache, modulations=modulations))
            start += size
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-6)


def test_drop_path_leaves_out_whole_branches_per_sample() -> None:
    torch.manual_seed(0)
    block = Block(LLAMA, drop_path=0.5)
    x, rotary = torch.randn(64, 3, 16), sequence_rotary(3, 8)
    attention = block.attention(block.attention_norm(x), rotary, "causal", None)
    outcomes = {}
    for first in (0, 1):
        h = x + 2 * first * attention
        for second in (0, 1):
            outcomes[first, second] = h + 2 * second * block.ffn(block.ffn_norm(h))
    trained = block.train()(x, rotary, "causal")
    found = Counter(
        kind
        for kind, outcome in outcomes.items()
        for one, other in zip(trained, outcome, strict=True)
        if torch.allclose(one, other, atol=1e-6)
    )
    assert sum(found.values()) == 64
    assert len(found) == 4
    expected = x + attention + block.ffn(block.ffn_norm(x + attention))
    torch.testing.assert_close(block.eval()(x, rotary, "causal"), expected)


def test_drop_path_rises_over_the_layers() -> None:
    transformer = Transformer(replace(LLAMA, layers=4, drop_path=0.3))
    assert [block.drop_path for block in transformer.blocks] == pytest.approx([0, 0.1, 0.2, 0.3])


def test_initial_weights() -> None:
    torch.manual_seed(0)
    model = AROptions(layers=2, dim=128, heads=4, ffn_multiple=32).build(TokenLayout.grid(4, 4, (512,)), 10)
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight)), name
        elif name == "outputs.0.weight":
            assert not weight.any()
        else:
            assert weight.std().item() == pytest.approx(0.02, rel=0.1), name
            assert abs(weight.mean().item()) < 2e-3, name


def disturbed(module: torch.nn.Module) -> torch.nn.Module:
    """Every weight away from its special initial value."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return module


def test_cosine_attention_is_the_plain_one() -> None:
    """VAR's: unit queries and keys, one factor per head, at most 100; keys have no bias."""
    attention = disturbed(Block(ARCHITECTURES[2])).attention
    with torch.no_grad():
        attention.log_scale[1] = 9.0
    x = torch.randn(2, 3, 16)
    projected = x @ attention.qkv.weight.T
    query, key, value = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in (
        projected[..., :16] + attention.query_bias, projected[..., 16:32], projected[..., 32:] + attention.value_bias
    ))  # fmt: skip
    factors = torch.tensor([attention.log_scale[0].exp().item(), 100.0])[:, None, None]
    cosines = (query / query.norm(dim=-1, keepdim=True)) @ (key / key.norm(dim=-1, keepdim=True)).transpose(2, 3)
    expected = attention.out(((factors * cosines).softmax(-1) @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, None, "none", None), expected)


def test_query_and_key_norm_is_the_plain_one() -> None:
    attention = disturbed(Block(ARCHITECTURES[1])).attention
    x = torch.randn(2, 3, 16)
    query, key, value = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in attention.qkv(x).chunk(3, dim=-1))
    query = F.layer_norm(query, (8,), attention.query_norm.weight, attention.query_norm.bias, 1e-6)
    key = F.layer_norm(key, (8,), attention.key_norm.weight, attention.key_norm.bias, 1e-6)
    expected = attention.out(((query @ key.transpose(2, 3) / 8**0.5).softmax(-1) @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, None, "none", None), expected)


def test_modulated_block_is_the_plain_one() -> None:
    torch.manual_seed(0)
    block, x, condition = disturbed(Block(ARCHITECTURES[1])), torch.randn(2, 3, 16), torch.randn(2, 3, 5)
    linear = block.modulation.linear
    gate_a, gate_f, scale_a, scale_f, shift_a, shift_f = linear(condition * condition.sigmoid()).chunk(6, dim=-1)
    inner = block.attention_norm(x) * (1 + scale_a) + shift_a
    middle = x + gate_a * block.attention(inner, None, "none", None)
    expected = middle + gate_f * block.ffn(block.ffn_norm(middle) * (1 + scale_f) + shift_f)
    torch.testing.assert_close(block(x, modulation=block.modulation(condition)), expected)


def test_shared_modulation_adds_a_table_per_block() -> None:
    transformer = disturbed(Transformer(ARCHITECTURES[2]))
    condition = torch.randn(2, 1, 5)
    shared = transformer.modulation(condition)
    for block, found in zip(transformer.blocks, transformer.modulations(condition), strict=True):
        torch.testing.assert_close(found, shared + block.modulation_table)


def test_post_norm_block_is_the_plain_one() -> None:
    torch.manual_seed(0)
    block = disturbed(Block(replace(LLAMA, norm="layer", ffn="gelu", bias=True, qkv_bias="all", post_norm=True)))
    x = torch.randn(2, 3, 16)
    middle = block.attention_norm(x + block.attention(x, None, "none", None))
    torch.testing.assert_close(block(x), block.ffn_norm(middle + block.ffn(middle)))


def test_modulated_norm_is_the_plain_one() -> None:
    torch.manual_seed(0)
    norm, x, condition = ModulatedNorm("layer", 6, 1e-6, 5), torch.randn(2, 3, 6), torch.randn(2, 1, 5)
    scale, shift = norm.modulation.linear(F.silu(condition)).chunk(2, dim=-1)
    expected = F.layer_norm(x, (6,), eps=1e-6) * (1 + scale) + shift
    torch.testing.assert_close(norm(x, norm.modulation(condition)), expected)


def test_gates_and_the_rest_begin_apart() -> None:
    transformer = Transformer(ARCHITECTURES[1])
    before = transformer.blocks[0].modulation.linear.weight.detach().clone()
    initialise_modulation(transformer, gates=0.0, others=0.5)
    after = transformer.blocks[0].modulation.linear.weight
    assert not after[:32].any()
    assert torch.equal(after[32:], before[32:] / 2)
