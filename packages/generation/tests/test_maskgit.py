"""MaskGIT: what it computes, what it learns from, what it samples, and what it refuses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout
from smalti.core.noise import uniform
from smalti.core.sampling_settings import SamplingSettings
from smalti.generation import maskgit
from smalti.generation.maskgit import MaskGIT, MaskGITOptions
from smalti.generation.masking import gumbel, masked_counts
from smalti.generation.sampling import guided, next_tokens

GRID = TokenLayout.grid(2, 3, (16,))
LAYOUTS = [GRID, TokenLayout.sequence(5, (9, 4))]
Build = Callable[..., MaskGIT]
PValue = Callable[[Tensor, Tensor], float]


@pytest.fixture
def build() -> Build:
    def build(layout: TokenLayout = GRID, classes: int = 5, **options: object) -> MaskGIT:
        torch.manual_seed(0)
        small = {"layers": 2, "dim": 32, "heads": 4, "ffn_dim": 48, "flatten": layout.streams > 1, **options}
        model = MaskGITOptions(**small).build(layout, classes)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn(weight.shape), alpha=0.2)
        return model.eval()

    return build


def tokens_of(model: MaskGIT, batch: int, spare: int = 0) -> Tensor:
    generator, layout = torch.Generator().manual_seed(1), model.token_layout
    streams = [torch.randint(size + spare, (batch, layout.positions), generator=generator) for size in layout.vocab]
    return torch.stack(streams, dim=-1)


def plain_logits(model: MaskGIT, tokens: Tensor, labels: Tensor) -> Tensor:
    """The plain twin for one stream: `(B, L, K)` from `(B, L)`."""
    weights, options = dict(model.named_parameters()), model.options

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + options.norm_eps).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def attention(x: Tensor, name: str) -> Tensor:
        query, key, value = linear(x, f"{name}.qkv").view(*x.shape[:2], 3, options.heads, -1).unbind(2)
        scores = torch.einsum("bihd,bjhd->bhij", query, key) / math.sqrt(options.dim // options.heads)
        return linear(torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), value).flatten(2), f"{name}.out")

    def ffn(x: Tensor, name: str) -> Tensor:
        return linear(F.gelu(linear(x, f"{name}.up")), f"{name}.down")

    def block(x: Tensor, name: str) -> Tensor:
        if options.form == "vit":
            x = norm(x + attention(x, f"{name}.attention"), f"{name}.attention_norm")
            return norm(x + ffn(x, f"{name}.ffn"), f"{name}.ffn_norm")
        x = x + attention(norm(x, f"{name}.attention_norm"), f"{name}.attention")
        return x + ffn(norm(x, f"{name}.ffn_norm"), f"{name}.ffn")

    classes = weights["condition.table.weight"][labels][:, None]
    x = torch.cat([classes, weights["embeddings.0.weight"][tokens]], dim=1) + weights["positions"]
    if options.form == "vit":
        x = norm(x, "norm")
        for layer in range(options.layers):
            x = block(x, f"transformer.blocks.{layer}")
        return linear(x[:, 1:], "outputs.0")
    half, kept = options.layers // 2, []
    for layer in range(half):
        x = block(x, f"transformer.downward.{layer}")
        kept.append(x)
    x = block(x, "transformer.middle")
    for layer in range(half):
        x = linear(torch.cat([x, kept[half - 1 - layer]], dim=-1), f"transformer.skips.{layer}")
        x = block(x, f"transformer.upward.{layer}")
    return linear(norm(x, "norm")[:, 1:], "outputs.0")


@pytest.mark.parametrize("options", [{}, {"form": "uvit", "layers": 4, "norm_eps": 1e-5}], ids=["vit", "uvit"])
def test_values_and_gradients_are_those_of_the_plain_twin(build: Build, options: dict[str, object]) -> None:
    model = build(**options).double()
    tokens, labels = tokens_of(model, 3, spare=1), torch.tensor([4, 0, 5])
    (logits,) = model.logits(tokens, labels)
    plain = plain_logits(model, tokens[:, :, 0], labels)
    torch.testing.assert_close(logits.double(), plain, rtol=1e-5, atol=1e-6)
    direction = torch.randn(plain.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weights = list(model.parameters())
    ours, twins = (torch.autograd.grad((out.double() * direction).sum(), weights) for out in (logits, plain))
    for one, other in zip(ours, twins, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@torch.no_grad()
def test_the_loss_is_the_plain_one(build: Build, monkeypatch: pytest.MonkeyPatch, layout: TokenLayout) -> None:
    model = build(layout, unmasked_weight=0.3, label_smoothing=0.2)
    tokens, labels = tokens_of(model, 2), torch.tensor([1, 3])
    mask = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(5)) < 0.5
    monkeypatch.setattr(maskgit, "random_mask", lambda batch, length, schedule, device: mask.flatten(1))
    logits = model.logits(torch.where(mask, torch.tensor(layout.vocab), tokens), labels)
    total, parts = 0.0, [0.0] * layout.streams
    for b, position, stream in itertools.product(range(2), range(layout.positions), range(layout.streams)):
        log_probabilities = logits[stream][b, position].log_softmax(0)
        # a fifth of the target is spread over all codes
        entropy = -0.8 * log_probabilities[tokens[b, position, stream]] - 0.2 * log_probabilities.mean()
        weight = 1.0 if mask[b, position, stream] else 0.3
        total, parts[stream] = total + weight, parts[stream] + weight * float(entropy)
    losses = model.loss(tokens, labels)
    assert [float(loss) for loss in losses.values()] == pytest.approx([part / total for part in parts], rel=1e-5)
    assert list(losses) == (["cross_entropy"] if layout.streams == 1 else ["cross_entropy_0", "cross_entropy_1"])


def plain_sample(model: MaskGIT, label: int, index: int, settings: SamplingSettings, steps: int) -> Tensor:
    """The plain twin for one sample: `(L, S)`, one token after the other, guidance always in two passes."""
    layout, of = model.token_layout, torch.tensor([index])
    masks = list(layout.vocab)
    tokens = torch.tensor([masks] * layout.positions)[None]
    counts = masked_counts(layout.positions * layout.streams, steps, model.options.schedule)
    for step in range(steps):
        conditional, null = (model.logits(tokens, torch.tensor([c])) for c in (label, model.classes))
        weight, left = settings.guidance_weight(step, step / steps), 1 - (step + 1) / steps
        temperature = settings.temperature * left
        confidence, drawn = {}, tokens.clone()
        for stream, size in enumerate(layout.vocab):
            logits = guided(torch.cat([conditional[stream], null[stream]]), weight)
            if settings.annealing:
                logits = logits / (0.5 + 0.8 * left)
            at = settings.model_copy(update={"temperature": temperature})
            codes = next_tokens(logits, at, of, step * layout.streams + stream)[0]
            noise = uniform(settings.seed, of, (steps + step) * layout.streams + stream, layout.positions)[0]
            for position in range(layout.positions):
                if tokens[0, position, stream] == size:
                    code = int(codes[position])
                    drawn[0, position, stream] = code
                    score = float(logits[0, position, code]) + temperature * float(gumbel(noise[position]))
                    confidence[position, stream] = score
        for position, stream in sorted(confidence, key=confidence.__getitem__)[: counts[step]]:
            drawn[0, position, stream] = masks[stream]
        tokens = drawn
    return tokens[0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        SamplingSettings(temperature=4.0, seed=7),
        SamplingSettings(temperature=2.0, guidance_scale=3.0, guidance="linear", annealing=True, top_k=5, top_p=0.9),
        SamplingSettings(temperature=0, guidance_scale=4.0, steps=3),
        SamplingSettings(temperature=9.0, guidance_scale=2.0, guidance="power-cosine", guidance_power=2.0, steps=12),
    ],
    ids=["noise", "linear", "greedy", "more steps than tokens"],
)
@torch.no_grad()
def test_samples_are_those_of_the_plain_twin(build: Build, layout: TokenLayout, settings: SamplingSettings) -> None:
    model, labels, indices = build(layout, steps=4), torch.tensor([0, 3, 4]), torch.tensor([8, 0, 3])
    steps = settings.steps or 4
    twins = [
        plain_sample(model, label, index, settings, steps)
        for label, index in zip(labels.tolist(), indices.tolist(), strict=True)
    ]
    assert torch.equal(model.sample(labels, settings, indices), torch.stack(twins))


@torch.no_grad()
def test_samples_have_the_probabilities_of_two_steps(build: Build, p_value: PValue) -> None:
    """With two tokens in two steps: draw both, keep the more confident one, and then take the likeliest other one."""
    model, count, temperature = build(TokenLayout.sequence(2, (3,))), 4000, 6.0
    half, label = temperature / 2, torch.tensor([2])
    (first,) = model.logits(torch.full((1, 2, 1), 3), label)
    drawn = (first[0] / half).softmax(-1)
    probabilities = torch.zeros(3, 3)
    for one, other in itertools.product(range(3), repeat=2):
        both = float(drawn[0, one] * drawn[1, other])
        # the difference of two Gumbel variables is logistic
        keeps_one = float(torch.sigmoid((first[0, 0, one] - first[0, 1, other]) / half))
        after_one = int(model.logits(torch.tensor([[[one], [3]]]), label)[0][0, 1].argmax())
        after_other = int(model.logits(torch.tensor([[[3], [other]]]), label)[0][0, 0].argmax())
        probabilities[one, after_one] += both * keeps_one
        probabilities[after_other, other] += both * (1 - keeps_one)
    settings = SamplingSettings(temperature=temperature, steps=2, seed=4)
    tokens = model.sample(label.expand(count), settings)[:, :, 0]
    counts = (tokens[:, 0] * 3 + tokens[:, 1]).bincount(minlength=9)
    possible = probabilities.flatten() > 0
    assert int(counts[~possible].sum()) == 0
    assert int(possible.sum()) >= 4
    assert p_value(counts[possible], probabilities.flatten()[possible]) > 1e-3


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_trace_tells_when_each_position_came(build: Build, layout: TokenLayout) -> None:
    model, settings = build(layout), SamplingSettings(steps=3, temperature=5.0, seed=1)
    tokens, steps = model.sample_traced(torch.arange(4), settings)
    assert torch.equal(tokens, model.sample(torch.arange(4), settings))
    assert steps.shape == (4, layout.positions)
    if layout.streams == 1:
        counts = masked_counts(layout.positions, 3, "arccos")
        assert all([int((row > step).sum()) for step in range(3)] == counts for row in steps)
    else:
        assert bool(((steps >= 0) & (steps < 3)).all())


def test_where_guidance_is_off_there_is_no_null_pass(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = build(), []
    plain = model._logits
    monkeypatch.setattr(model, "_logits", lambda *inputs: (rows.append(len(inputs[0])), plain(*inputs))[1])
    model.sample(torch.arange(2), SamplingSettings(guidance_scale=3.0, guidance="linear", steps=3))
    assert rows == [2, 4, 4]


def test_guidance_without_label_dropout_is_told(build: Build) -> None:
    with pytest.raises(UserError, match="guidance needs a generator trained with label_dropout above 0"):
        build(label_dropout=0.0).sample(torch.arange(2), SamplingSettings(guidance_scale=2.0))


def test_settings_of_other_streams_are_told(build: Build) -> None:
    with pytest.raises(UserError) as raised:
        build().sample(torch.arange(2), SamplingSettings(top_k=(1, 2)))
    assert str(raised.value) == "top_k lists 2 values, but the tokens have 1 streams"


def test_wrong_options_are_told() -> None:
    with pytest.raises(ValidationError, match="uvit has an even number of layers, beside the one in the middle, not 3"):
        MaskGITOptions(form="uvit", layers=3)
    with pytest.raises(ValidationError, match="dim 30 must be a multiple of the number of heads"):
        MaskGITOptions(dim=30, heads=4)


def test_layouts_it_cannot_take_are_told() -> None:
    options = MaskGITOptions()
    assert options.supports(TokenLayout.scales(((1, 1), (2, 2)), (16,))) == (
        "it predicts any tokens of a grid or a sequence, not scale by scale"
    )
    assert options.supports(TokenLayout.grid(2, 2, (4, 4))) == (
        "it models one stream of codes, not 2, unless flatten is on"
    )
    assert MaskGITOptions(flatten=True).supports(TokenLayout.grid(2, 2, (4, 4))) is None
