"""RAR: what it computes in any order, how orders are annealed, what it samples, and what it refuses."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout
from smalti.core.sampling_settings import SamplingSettings
from smalti.generation import rar
from smalti.generation.rar import RAR, RAROptions
from smalti.generation.sampling import guided, next_tokens

GRID = TokenLayout.grid(2, 3, (16,))
LAYOUTS = [GRID, TokenLayout.sequence(4, (9, 5))]
Build = Callable[..., RAR]
PValue = Callable[[Tensor, Tensor], float]


@pytest.fixture
def cached_logits(monkeypatch: pytest.MonkeyPatch) -> Callable[[RAR, Tensor, Tensor], list[Tensor]]:
    monkeypatch.syspath_prepend(Path(__file__).parent / "parity")
    return importlib.import_module("replay").cached_logits


@pytest.fixture
def build() -> Build:
    def build(layout: TokenLayout = GRID, classes: int = 5, **options: object) -> RAR:
        torch.manual_seed(0)
        small = {"layers": 2, "dim": 32, "heads": 4, "ffn_dim": 48, "flatten": layout.streams > 1, **options}
        model = RAROptions(**small).build(layout, classes)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn(weight.shape), alpha=0.2)
        return model.eval()

    return build


def tokens_of(model: RAR, batch: int) -> Tensor:
    generator, layout = torch.Generator().manual_seed(1), model.token_layout
    streams = [torch.randint(size, (batch, layout.positions), generator=generator) for size in layout.vocab]
    return torch.stack(streams, dim=-1)


def orders_of(model: RAR, batch: int) -> Tensor:
    return torch.rand(batch, model.token_layout.positions, generator=torch.Generator().manual_seed(2)).argsort(1)


def plain_logits(model: RAR, tokens: Tensor, label: int, order: list[int]) -> Tensor:
    """The plain twin for one sample of one stream, `(L, K)`: one row after the other, straight from the paper."""
    weights, heads, eps = dict(model.named_parameters()), model.options.heads, model.options.norm_eps
    dim, codes = model.options.dim, [int(tokens[place, 0]) for place in order]

    def linear(x: Tensor, name: str) -> Tensor:
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    def norm(x: Tensor, name: str | None = None) -> Tensor:
        x = (x - x.mean()) / (x.var(correction=0) + eps).sqrt()
        return x if name is None else x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    start, klass = weights["start"], weights["condition.table.weight"][label]
    rows = [start + weights["positions"][0], klass + weights["positions"][1] + weights["targets"][order[0]]]
    for k, code in enumerate(codes[:-1]):
        embedded = weights["embeddings.0.weight"][code] + weights["positions"][2 + order[k]]
        rows.append(embedded + weights["targets"][order[k + 1]])
    conditions = [F.silu(klass + weights["times"][k]) for k in range(len(rows))]
    for layer in range(model.options.layers):
        name = f"transformer.blocks.{layer}"
        parts = [linear(condition, f"{name}.modulation.linear").view(6, dim) for condition in conditions]
        queries, keys, values = [], [], []
        for row, (_, _, scale, _, shift, _) in zip(rows, parts, strict=True):
            inner = norm(row, f"{name}.attention_norm") * (1 + scale) + shift
            query, key, value = linear(inner, f"{name}.attention.qkv").view(3, heads, -1)
            queries.append([norm(head, f"{name}.attention.query_norm") for head in query])
            keys.append([norm(head, f"{name}.attention.key_norm") for head in key])
            values.append(value)
        for k, (gate_a, gate_f, _, scale, _, shift) in enumerate(parts):
            seen = []
            for head in range(heads):
                scores = torch.stack([queries[k][head] @ keys[j][head] for j in range(k + 1)]) / math.sqrt(dim // heads)
                seen.append(sum(s * values[j][head] for j, s in enumerate(scores.softmax(0))))
            rows[k] = rows[k] + gate_a * linear(torch.cat(seen), f"{name}.attention.out")
            inner = norm(rows[k], f"{name}.ffn_norm") * (1 + scale) + shift
            rows[k] = rows[k] + gate_f * linear(F.gelu(linear(inner, f"{name}.ffn.up")), f"{name}.ffn.down")
    logits = []
    for row, condition in zip(rows[1:], conditions[1:], strict=True):
        scale, shift = linear(condition, "norm.modulation.linear").view(2, dim)
        logits.append(linear(norm(row) * (1 + scale) + shift, "outputs.0"))
    return torch.stack(logits)


def test_values_and_gradients_are_those_of_the_plain_twin(build: Build) -> None:
    model = build(TokenLayout.grid(2, 2, (16,)), dim=16, heads=2).double()
    tokens, labels, orders = tokens_of(model, 2), torch.tensor([4, 1]), orders_of(model, 2)
    (logits,) = model.logits(tokens, labels, orders)
    plain = torch.stack([plain_logits(model, tokens[b], int(labels[b]), orders[b].tolist()) for b in range(2)])
    torch.testing.assert_close(logits.double(), plain, rtol=1e-5, atol=1e-6)
    direction = torch.randn(plain.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weights = [weight for name, weight in model.named_parameters()]
    ours, twins = (torch.autograd.grad((out.double() * direction).sum(), weights) for out in (logits, plain))
    for one, other in zip(ours, twins, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@torch.no_grad()
def test_the_raster_order_is_the_default(build: Build, layout: TokenLayout) -> None:
    model = build(layout)
    tokens, labels = tokens_of(model, 3), torch.arange(3)
    raster = torch.arange(layout.positions).expand(3, -1)
    assert all(
        torch.equal(*pair)
        for pair in zip(model.logits(tokens, labels), model.logits(tokens, labels, raster), strict=True)
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@torch.no_grad()
def test_a_token_changes_no_logits_before_it_in_the_order(build: Build, layout: TokenLayout) -> None:
    model = build(layout)
    tokens, labels, orders = tokens_of(model, 1), torch.tensor([2]), orders_of(model, 1)

    def rows(of: Tensor) -> list[Tensor]:
        parts = model.logits(of, labels, orders)
        return [parts[s][0, k] for k in range(layout.positions) for s in range(layout.streams)]

    before = rows(tokens)
    for k, place in enumerate(orders[0].tolist()):
        for stream in range(layout.streams):
            changed = tokens.clone()
            changed[0, place, stream] = (changed[0, place, stream] + 1) % layout.vocab[stream]
            same = [torch.equal(*pair) for pair in zip(before, rows(changed), strict=True)]
            index = k * layout.streams + stream
            assert all(same[: index + 1])
            assert not any(same[index + 1 :])


@pytest.mark.parametrize("at_once", [2, 3, 512])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_cache_gives_the_logits_of_teacher_forcing(
    build: Build,
    cached_logits: Callable[[RAR, Tensor, Tensor], list[Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    layout: TokenLayout,
    at_once: int,
) -> None:
    monkeypatch.setattr(rar, "MODULATED_AT_ONCE", at_once)
    model = build(layout)
    tokens, labels = tokens_of(model, 1), torch.tensor([3])
    with torch.no_grad():
        for cached, forced in zip(cached_logits(model, tokens, labels), model.logits(tokens, labels), strict=True):
            torch.testing.assert_close(cached, forced, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@torch.no_grad()
def test_samples_are_those_of_the_plain_twin(build: Build, layout: TokenLayout) -> None:
    model, labels = build(layout), torch.tensor([0, 3, 4])
    settings = SamplingSettings(
        guidance_scale=3.0, guidance="power-cosine", guidance_power=1.5, temperature=1.1, top_k=7, seed=5
    )
    tokens, null = torch.zeros(3, layout.positions, layout.streams, dtype=torch.int64), torch.full_like(labels, 5)
    for position, stream in itertools.product(range(layout.positions), range(layout.streams)):
        both = torch.cat([model.logits(tokens, some)[stream][:, position] for some in (labels, null)])
        weight = 1 + 2 * (1 - math.cos(math.pi * (position / layout.positions) ** 1.5)) / 2
        step = position * layout.streams + stream
        tokens[:, position, stream] = next_tokens(guided(both, weight), settings, torch.arange(3), step)
    assert torch.equal(model.sample(labels, settings), tokens)


def test_samples_have_the_probabilities_of_the_model(build: Build, p_value: PValue) -> None:
    model, count = build(TokenLayout.sequence(2, (3,))), 4000
    pairs = torch.tensor(list(itertools.product(range(3), repeat=2)))[:, :, None]
    with torch.no_grad():
        (logits,) = model.logits(pairs, torch.full((9,), 2))
    expected = logits.log_softmax(-1).gather(-1, pairs).sum((1, 2)).exp()
    drawn = model.sample(torch.full((count,), 2), SamplingSettings(seed=1))[:, :, 0]
    observed = (drawn[:, 0] * 3 + drawn[:, 1]).bincount(minlength=9)
    assert p_value(observed, expected) > 1e-3


@pytest.mark.parametrize(("step", "share"), [(0, 1.0), (10, 1.0), (15, 0.75), (29, 0.05), (30, 0.0), (99, 0.0)])
def test_orders_become_raster(build: Build, step: int, share: float) -> None:
    model = build(random_until=10, raster_from=30).train()
    model.begin_step(step)
    assert float(model.random_share) == pytest.approx(share)
    torch.manual_seed(4)
    orders = model._orders(4000, torch.device("cpu"))
    assert torch.equal(orders.sort(1).values, torch.arange(6).expand(4000, -1))
    # one of the 720 orders is raster by chance
    random = (orders != torch.arange(6)).any(1).double().mean()
    assert float(random) == pytest.approx(share * 719 / 720, abs=0.03)


def test_in_training_the_loss_is_that_of_the_orders(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(dropout=0.0, attention_dropout=0.0, label_dropout=0.0)
    tokens, labels, orders = tokens_of(model, 3), torch.arange(3), orders_of(model, 3)
    (logits,) = model.logits(tokens, labels, orders)
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, :, 0].gather(1, orders).flatten())
    monkeypatch.setattr(model, "_orders", lambda batch, device: orders)
    torch.testing.assert_close(model.train().loss(tokens, labels)["cross_entropy"], expected)
    raster = F.cross_entropy(model.logits(tokens, labels)[0].flatten(0, 1), tokens.flatten())
    torch.testing.assert_close(model.eval().loss(tokens, labels)["cross_entropy"], raster)


def test_the_step_is_no_weight(build: Build) -> None:
    assert "random_share" not in build().state_dict()


def test_at_the_beginning_no_block_does_anything() -> None:
    model = RAROptions(layers=2, dim=32, heads=4, ffn_dim=48).build(GRID, 5).eval()
    tokens = tokens_of(model, 2)
    outputs = [model.logits(tokens, torch.full((2,), label))[0] for label in range(2)]
    assert torch.equal(outputs[0][:, 1:], outputs[1][:, 1:])


def test_a_trace_is_raster(build: Build) -> None:
    model, settings = build(), SamplingSettings(seed=2)
    tokens, steps = model.sample_traced(torch.arange(3), settings)
    assert torch.equal(tokens, model.sample(torch.arange(3), settings))
    assert torch.equal(steps, torch.arange(6).expand(3, -1))


@pytest.mark.parametrize(("name", "value"), [("steps", 4), ("annealing", True)])
def test_settings_of_masked_generation_are_told(build: Build, name: str, value: object) -> None:
    with pytest.raises(UserError) as raised:
        build().sample(torch.arange(2), SamplingSettings(**{name: value}))
    assert str(raised.value) == f"{name} is of generators that draw many tokens at once, as maskgit; leave it out"


def test_guidance_without_label_dropout_is_told(build: Build) -> None:
    with pytest.raises(UserError, match="guidance needs a generator trained with label_dropout above 0"):
        build(label_dropout=0.0).sample(torch.arange(2), SamplingSettings(guidance_scale=2.0))


def test_wrong_options_are_told() -> None:
    with pytest.raises(ValidationError, match="orders cannot all be raster before random_until, 10"):
        RAROptions(random_until=10, raster_from=9)
    with pytest.raises(ValidationError, match="dim 30 must be a multiple of the number of heads"):
        RAROptions(dim=30, heads=4)


def test_layouts_it_cannot_take_are_told() -> None:
    options = RAROptions()
    assert options.supports(TokenLayout.scales(((1, 1), (2, 2)), (16,))) == (
        "it predicts one token after the other over a grid or a sequence, not scale by scale"
    )
    assert options.supports(TokenLayout.grid(2, 2, (4, 4))) == (
        "it models one stream of codes, not 2, unless flatten is on"
    )
    assert RAROptions(flatten=True).supports(TokenLayout.grid(2, 2, (4, 4))) is None
