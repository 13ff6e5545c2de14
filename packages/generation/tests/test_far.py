"""FAR: what it computes, what it samples, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout
from smalti.core.sampling_settings import SamplingSettings
from smalti.generation.far import FAR, FAROptions
from smalti.generation.sampling import guided, next_tokens

GAUSSIAN = TokenLayout.sequence(5, (32, 8, 8, 8, 8, 8))
LAYOUTS = [TokenLayout.grid(2, 3, (16, 7)), TokenLayout.grid(2, 2, (9, 9, 9)), GAUSSIAN]
Build = Callable[..., FAR]


@pytest.fixture
def build() -> Build:
    def build(layout: TokenLayout = LAYOUTS[0], classes: int = 5, **options: object) -> FAR:
        torch.manual_seed(0)
        small = {"layers": 2, "inner_layers": 2, "dim": 32, "heads": 4, "ffn_multiple": 8, **options}
        model = FAROptions(**small).build(layout, classes)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn(weight.shape), alpha=0.2)
        return model.eval()

    return build


def tokens_of(model: FAR, batch: int) -> Tensor:
    generator, layout = torch.Generator().manual_seed(1), model.token_layout
    streams = [torch.randint(size, (batch, layout.positions), generator=generator) for size in layout.vocab]
    return torch.stack(streams, dim=-1)


def uncached(model: FAR, labels: Tensor, settings: SamplingSettings) -> Tensor:
    """The plain twin of `sample`: every token computes the whole sequence again, guidance in two passes."""
    layout = model.token_layout
    tokens = torch.zeros(len(labels), layout.positions, layout.streams, dtype=torch.int64)
    null = torch.full_like(labels, model.classes)
    for position in range(layout.positions):
        for stream, chosen in enumerate(settings.per_stream(layout.streams)):
            both = torch.cat([model.logits(tokens, some)[stream][:, position] for some in (labels, null)])
            logits = guided(both, chosen.guidance_scale)
            step = position * layout.streams + stream
            tokens[:, position, stream] = next_tokens(logits, chosen, torch.arange(len(labels)), step)
    return tokens


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("aggregation", ["projection", "sum"])
@torch.no_grad()
def test_samples_are_those_of_the_plain_twin(build: Build, layout: TokenLayout, aggregation: str) -> None:
    model = build(layout, aggregation=aggregation)
    labels = torch.tensor([0, 3, 4])
    settings = SamplingSettings(guidance_scale=2.5, temperature=0.9, top_k=7, top_p=0.9, seed=5)
    assert torch.equal(model.sample(labels, settings), uncached(model, labels, settings))


@torch.no_grad()
def test_every_stream_has_its_own_settings(build: Build) -> None:
    model = build()
    labels = torch.arange(5)
    settings = SamplingSettings(guidance_scale=(1.0, 3.0), temperature=(0.0, 1.2), top_k=(0, 5), top_p=(1.0, 0.8))
    assert torch.equal(model.sample(labels, settings), uncached(model, labels, settings))


def test_settings_of_other_streams_are_told(build: Build) -> None:
    with pytest.raises(UserError) as raised:
        build().sample(torch.arange(2), SamplingSettings(top_k=(1, 2, 3)))
    assert str(raised.value) == "top_k lists 3 values, but the tokens have 2 streams"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_token_changes_no_logits_before_it(build: Build, layout: TokenLayout) -> None:
    model = build(layout)
    tokens, labels = tokens_of(model, 1), torch.tensor([2])

    def flat(of: Tensor) -> list[Tensor]:
        """Logits in the order in which tokens are predicted."""
        parts = model.logits(of, labels)
        return [parts[stream][0, position] for position in range(layout.positions) for stream in range(layout.streams)]

    before = flat(tokens)
    for place in range(len(before)):
        changed = tokens.clone()
        position, stream = divmod(place, layout.streams)
        changed[:, position, stream] = (changed[:, position, stream] + 1) % layout.vocab[stream]
        for other, (one, two) in enumerate(zip(before, flat(changed), strict=True)):
            assert torch.allclose(one, two, rtol=0, atol=1e-6) == (other <= place), (place, other)


def test_the_caches_are_allocated_once(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = build(), []
    for transformer in (model.transformer, model.inner):
        new = transformer.new_cache
        monkeypatch.setattr(transformer, "new_cache", lambda *size, new=new: made.append(size) or new(*size))
    model.sample(torch.arange(3), SamplingSettings(guidance_scale=2.0))
    assert made == [(6, 6), (6, 2)]


@pytest.mark.parametrize(("objective", "expected"), [("mean", 0.5), ("sum", 1.0)])
def test_the_first_loss_is_that_of_equal_probabilities(objective: str, expected: float) -> None:
    options = FAROptions(layers=1, inner_layers=1, dim=16, heads=2, ffn_multiple=8, objective=objective)
    model = options.build(LAYOUTS[0], 5)
    losses = model.loss(tokens_of(model, 4), torch.arange(4))
    assert losses["cross_entropy_0"].item() == pytest.approx(expected * math.log(16))
    assert losses["cross_entropy_1"].item() == pytest.approx(expected * math.log(7))


@pytest.mark.parametrize(("chance", "trained"), [(0.0, {0, 2}), (1.0, {5})])
def test_label_dropout_trains_the_null_class(build: Build, chance: float, trained: set[int]) -> None:
    model = build(label_dropout=chance).train()
    torch.stack(list(model.loss(tokens_of(model, 4), torch.tensor([0, 2, 2, 0])).values())).sum().backward()
    gradient = model.condition.table.weight.grad
    assert set(gradient.abs().sum(-1).nonzero().flatten().tolist()) == trained


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (TokenLayout.scales(((1, 1), (2, 2)), (16, 16)), "it predicts one position after the other over a grid or a "
         "sequence, not scale by scale"),
        (TokenLayout.grid(2, 2, (16,)), "it models several streams of codes; ar models one"),
        (TokenLayout.grid(1, 1, (9, 9, 9)), "its inner head has rotations for 2 streams, one more than positions"),
    ],
)  # fmt: skip
def test_unsupported_layouts_are_told(layout: TokenLayout, reason: str) -> None:
    assert FAROptions().supports(layout) == reason
    with pytest.raises(UserError) as raised:
        FAROptions().build(layout, 5)
    assert str(raised.value) == f"generator 'far' cannot take the layout {layout}: {reason}"
