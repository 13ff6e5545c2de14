"""AR: what it computes, what it samples, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from smalti.core.contracts import Generator
from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout
from smalti.core.options import GeneratorOptions, Options, Slot, sentences
from smalti.core.sampling_settings import SamplingSettings
from smalti.generation.ar import AR, AROptions
from smalti.generation.sampling import guided, next_tokens

LAYOUTS = [TokenLayout.grid(3, 4, (16,)), TokenLayout.sequence(7, (16,)), TokenLayout.grid(1, 1, (16,))]
Build = Callable[..., AR]


def tokens_of(model: AR, batch: int) -> Tensor:
    size = (batch, model.token_layout.positions, 1)
    return torch.randint(model.token_layout.vocab[0], size, generator=torch.Generator().manual_seed(1))


def uncached(model: AR, labels: Tensor, settings: SamplingSettings) -> Tensor:
    """The plain twin of `sample`: every step computes the whole sequence again, guidance in two passes."""
    tokens = torch.zeros(len(labels), model.token_layout.positions, 1, dtype=torch.int64)
    null = torch.full_like(labels, model.classes)
    for step in range(model.token_layout.positions):
        both = torch.cat([model.logits(tokens, labels)[0][:, step], model.logits(tokens, null)[0][:, step]])
        logits = guided(both, settings.guidance_scale)
        tokens[:, step, 0] = next_tokens(logits, settings, torch.arange(len(labels)), step)
    return tokens


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_token_changes_no_logits_before_it(build: Build, layout: TokenLayout) -> None:
    model = build(layout)
    tokens, labels = tokens_of(model, 1), torch.tensor([2])
    (before,) = model.logits(tokens, labels)
    for position in range(layout.positions):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % 16
        (after,) = model.logits(changed, labels)
        torch.testing.assert_close(after[:, : position + 1], before[:, : position + 1], rtol=0, atol=1e-6)
        if position + 1 < layout.positions:
            assert bool(((after - before)[:, position + 1 :].abs().amax(-1) > 1e-5).all())


def test_the_class_changes_all_logits(build: Build) -> None:
    model = build()
    tokens = tokens_of(model, 1)
    first, second = (model.logits(tokens, torch.tensor([label]))[0] for label in (0, 1))
    assert bool(((first - second).abs().amax(-1) > 1e-4).all())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.0, 2.5])
@torch.no_grad()
def test_samples_are_those_of_the_plain_twin(build: Build, layout: TokenLayout, scale: float) -> None:
    model = build(layout)
    labels = torch.tensor([0, 3, 4, 1])
    settings = SamplingSettings(guidance_scale=scale, temperature=0.9, top_k=9, top_p=0.9, seed=5)
    assert torch.equal(model.sample(labels, settings), uncached(model, labels, settings))


@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=str)
def test_samples_do_not_depend_on_the_batch(build: Build, layout: TokenLayout) -> None:
    model = build(layout)
    labels, indices = torch.arange(40) % 5, torch.arange(40)
    settings = SamplingSettings(guidance_scale=2.0, top_k=12, top_p=0.95, seed=9)
    whole = model.sample(labels, settings)
    for size in (1, 7, 16):
        parts = [
            model.sample(some, settings, numbers)
            for some, numbers in zip(labels.split(size), indices.split(size), strict=True)
        ]
        assert torch.equal(torch.cat(parts), whole), f"batches of {size}"


def test_samples_can_be_trained_on(build: Build) -> None:
    model = build()
    labels = torch.arange(3)
    model.loss(model.sample(labels, SamplingSettings()), labels)["cross_entropy"].backward()
    assert model.embeddings[0].weight.grad is not None


def test_a_failed_sampling_leaves_the_mode(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build().train()
    monkeypatch.setattr(model.norm, "forward", lambda *_: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        model.sample(torch.arange(3), SamplingSettings())
    assert model.training


def test_all_parameters_get_gradients(build: Build) -> None:
    model = build(label_dropout=0.5).train()
    torch.manual_seed(0)
    model.loss(tokens_of(model, 8), torch.arange(8) % 5)["cross_entropy"].backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert bool(weight.grad.abs().sum() > 0), name


def test_the_first_loss_is_that_of_equal_probabilities() -> None:
    model = AROptions(layers=1, dim=16, heads=2, ffn_multiple=8).build(TokenLayout.grid(3, 4, (16,)), 5)
    loss = model.loss(tokens_of(model, 4), torch.arange(4))["cross_entropy"]
    assert loss.item() == pytest.approx(math.log(16))


def test_the_loss_is_the_mean_over_all_positions(build: Build) -> None:
    model = build()
    tokens, labels = tokens_of(model, 3), torch.tensor([0, 1, 4])
    log_probabilities = model.logits(tokens, labels)[0].log_softmax(-1)
    expected = -torch.stack([log_probabilities[b, n, tokens[b, n, 0]] for b in range(3) for n in range(12)]).mean()
    torch.testing.assert_close(model.loss(tokens, labels), {"cross_entropy": expected})


@pytest.mark.parametrize(("chance", "trained"), [(0.0, {0, 2}), (1.0, {5})])
def test_label_dropout_trains_the_null_class(build: Build, chance: float, trained: set[int]) -> None:
    model = build(label_dropout=chance).train()
    model.loss(tokens_of(model, 4), torch.tensor([0, 2, 2, 0]))["cross_entropy"].backward()
    gradient = model.condition.table.weight.grad
    assert gradient is not None
    assert set(gradient.abs().sum(-1).nonzero().flatten().tolist()) == trained


def test_training_is_random_by_the_global_seed_and_evaluation_is_not(build: Build) -> None:
    model = build(label_dropout=0.5, dropout=0.2, drop_path=0.2)
    tokens, labels = tokens_of(model, 8), torch.arange(8) % 5

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return model.loss(tokens, labels)["cross_entropy"].item()

    assert loss(1) == loss(2)
    model.train()
    assert loss(1) == loss(1)
    assert loss(1) != loss(2)


def test_autocast(build: Build) -> None:
    model = build()
    tokens, labels = tokens_of(model, 4), torch.arange(4)
    (exact,) = model.logits(tokens, labels)
    with torch.autocast("cpu", torch.bfloat16):
        (logits,) = model.logits(tokens, labels)
        drawn = model.sample(labels, SamplingSettings(guidance_scale=2.0, top_k=9))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, exact, rtol=0, atol=0.05 * exact.std().item() + 0.05)
    assert drawn.shape == (4, 12, 1)


def test_low_precision_weights(build: Build) -> None:
    model = build()
    tokens, labels = tokens_of(model, 4), torch.arange(4)
    (exact,) = model.logits(tokens, labels)
    (logits,) = model.bfloat16().logits(tokens, labels)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, exact, rtol=0, atol=0.1 * exact.std().item())
    assert model.sample(labels, SamplingSettings(guidance_scale=2.0)).shape == (4, 12, 1)


def test_it_is_registered_and_loads_by_name(build: Build, tmp_path: Path) -> None:
    model = build(TokenLayout.sequence(7, (16,)), drop_path=0.1)
    model.save_pretrained(tmp_path)
    loaded = Generator.from_pretrained(tmp_path)
    assert isinstance(loaded, AR)
    assert loaded.options == model.options
    tokens, labels = tokens_of(model, 2), torch.arange(2)
    assert torch.equal(loaded.logits(tokens, labels)[0], model.logits(tokens, labels)[0])


class _Recipe(Options):
    generator: Annotated[GeneratorOptions, Slot("generator")]


def test_wrong_options_are_told_with_their_path() -> None:
    with pytest.raises(ValidationError) as raised:
        _Recipe.model_validate({"generator": {"name": "ar", "dim": 96, "heads": 5}})
    expected = "generator.heads: dim 96 must be a multiple of 4 times the number of heads, got 5"
    assert sentences(raised.value) == expected


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (
            TokenLayout.scales(((1, 1), (2, 2)), (16,)),
            "generator 'ar' cannot take the layout scales 1x1, 2x2, 1 stream of 16 codes: it predicts one token after "
            "the other over a grid or a sequence, not scale by scale",
        ),
        (
            TokenLayout.grid(2, 2, (16, 16)),
            "generator 'ar' cannot take the layout grid 2x2, 2 streams of 16 codes: it models one stream of codes, "
            "not 2, unless flatten is on",
        ),
    ],
)
def test_unsupported_layouts_are_told(layout: TokenLayout, reason: str) -> None:
    with pytest.raises(UserError) as raised:
        AROptions().build(layout, 5)
    assert str(raised.value) == reason


def test_wrong_labels_are_told(build: Build) -> None:
    model = build()
    sentence = "label 5 is out of range: there are 5 classes, 0 to 4"
    for call in (
        lambda: model.sample(torch.tensor([0, 5]), SamplingSettings()),
        lambda: model.loss(tokens_of(model, 2), torch.tensor([0, 5])),
    ):
        with pytest.raises(UserError) as raised:
            call()
        assert str(raised.value) == sentence


@pytest.mark.parametrize("wrong", [-1, 16])
def test_wrong_tokens_are_told(build: Build, wrong: int) -> None:
    model = build()
    tokens = tokens_of(model, 2)
    tokens[1, 3] = wrong
    with pytest.raises(UserError) as raised:
        model.loss(tokens, torch.tensor([0, 1]))
    assert str(raised.value) == (f"token {wrong} is out of range: stream 0 of the layout has 16 codes, 0 to 15")


def test_wrong_shapes_are_told(build: Build) -> None:
    model = build()
    for tokens, got in (
        (torch.zeros(2, 12, dtype=torch.int64), "torch.int64 (2, 12)"),
        (torch.zeros(2, 11, 1, dtype=torch.int64), "torch.int64 (2, 11, 1)"),
        (torch.zeros(2, 12, 1), "torch.float32 (2, 12, 1)"),
    ):
        with pytest.raises(UserError) as raised:
            model.loss(tokens, torch.tensor([0, 1]))
        assert str(raised.value) == (f"tokens of grid 3x4, 1 stream of 16 codes must be int64 (B, 12, 1), got {got}")
    with pytest.raises(UserError) as raised:
        model.loss(tokens_of(model, 2), torch.tensor([0]))
    assert str(raised.value) == "labels must be (2,), one per image, got (1,)"


def test_guidance_without_label_dropout_is_told(build: Build) -> None:
    model = build(label_dropout=0.0)
    with pytest.raises(UserError) as raised:
        model.sample(torch.arange(2), SamplingSettings(guidance_scale=2.0))
    assert str(raised.value) == ("guidance needs a generator trained with label_dropout above 0; take guidance_scale=1")
    assert model.sample(torch.arange(2), SamplingSettings()).shape == (2, 12, 1)


def test_several_streams_stand_one_after_the_other(build: Build) -> None:
    """Sub-token by sub-token: each sees those before it and no other."""
    layout = TokenLayout.grid(2, 2, (16, 5, 7))
    model = build(layout, flatten=True)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.stack([torch.randint(size, (1, 4), generator=generator) for size in layout.vocab], dim=-1)
    labels = torch.tensor([2])

    def flat(of: Tensor) -> list[Tensor]:
        parts = model.logits(of, labels)
        return [parts[stream][0, position] for position in range(4) for stream in range(3)]

    before = flat(tokens)
    assert [len(part) for part in before] == [16, 5, 7] * 4
    for place in range(12):
        changed = tokens.clone()
        changed[:, place // 3, place % 3] = (changed[:, place // 3, place % 3] + 1) % layout.vocab[place % 3]
        for other, (one, two) in enumerate(zip(before, flat(changed), strict=True)):
            assert torch.allclose(one, two, rtol=0, atol=1e-6) == (other <= place), (place, other)


@pytest.mark.parametrize(
    "options",
    [{"flatten": True}, {"modulation": True}, {"blocks": "gpt"}, {"blocks": "gpt", "modulation": True}],
    ids=str,
)
@torch.no_grad()
def test_decoding_agrees_with_teacher_forcing(build: Build, options: dict[str, object]) -> None:
    """Greedy tokens are the most likely ones given those before them."""
    layout = TokenLayout.grid(2, 3, (16, 5) if "flatten" in options else (16,))
    model = build(layout, **options)
    labels = torch.tensor([0, 3, 4])
    tokens = model.sample(labels, SamplingSettings(temperature=0, guidance_scale=1.7))
    null = torch.full_like(labels, model.classes)
    parts = zip(model.logits(tokens, labels), model.logits(tokens, null), strict=True)
    expected = [(without + (given - without) * 1.7).argmax(-1) for given, without in parts]
    assert torch.equal(tokens, torch.stack(expected, dim=-1))


def captions(batch: int, lengths: list[int]) -> Tensor:
    features = torch.randn(batch, 6, 10, generator=torch.Generator().manual_seed(4))
    for caption, length in zip(features, lengths, strict=True):
        caption[: 6 - length] = 0
    return features


@torch.no_grad()
def test_captions_stand_in_front_and_their_padding_is_not_seen(build: Build) -> None:
    model = build(classes=1, captions={"length": 6, "width": 10})
    tokens, texts = tokens_of(model, 2), captions(2, [2, 6])
    (logits,) = model.logits(tokens, texts)
    (alone,) = model.logits(tokens[:1], texts[:1])
    torch.testing.assert_close(logits[:1], alone)
    null = model.condition(texts, torch.tensor([True, False]))
    torch.testing.assert_close(null[0], model.condition(model.condition.null[None])[0])
    torch.testing.assert_close(null[1], model.condition(texts)[1])
    greedy = model.sample(texts, SamplingSettings(temperature=0, guidance_scale=1.0))
    (again,) = model.logits(greedy, texts)
    assert torch.equal(greedy[:, :, 0], again.argmax(-1))


def test_captions_train(build: Build) -> None:
    model = build(classes=1, captions={"length": 6, "width": 10}, label_dropout=0.5).train()
    torch.manual_seed(0)
    model.loss(tokens_of(model, 8), captions(8, [1, 2, 3, 4, 5, 6, 6, 6]))["cross_entropy"].backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert bool(weight.grad.abs().sum() > 0), name


def test_wrong_captions_are_told(build: Build) -> None:
    model = build(classes=1, captions={"length": 6, "width": 10})
    with pytest.raises(UserError) as raised:
        model.sample(torch.arange(2), SamplingSettings())
    assert str(raised.value) == ("captions must be float (B, 6, 10), left-padded with zero rows, got torch.int64 (2,)")


def test_a_shared_class_is_embedded_as_its_code(build: Build) -> None:
    model = build(classes=16, blocks="gpt", shared_classes=True, label_dropout=0.0)
    assert not [name for name in model.state_dict() if name.startswith("condition")]
    tokens = tokens_of(model, 2)
    (logits,) = model.logits(tokens, torch.tensor([3, 9]))
    with torch.no_grad():
        model.embeddings[0].weight[3, 0] += 1.0
    (changed,) = model.logits(tokens, torch.tensor([3, 9]))
    assert bool(((changed - logits)[0].abs().amax(-1) > 1e-4).all())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"shared_classes": True},
            "shared_classes: there is no null class: label_dropout must be 0, got True",
        ),
        (
            {"modulation": True, "shared_classes": True, "label_dropout": 0.0},
            "shared_classes: modulation needs a table of classes of its own, got True",
        ),
        ({"modulation": True, "captions": {}}, "captions: modulation needs classes, not captions, got {}"),
    ],
    ids=["shared", "modulated", "captions"],
)
def test_options_that_exclude_each_other_are_told(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValidationError) as raised:
        AROptions(**options)
    assert sentences(raised.value) == sentence


def test_shared_classes_must_be_codes() -> None:
    with pytest.raises(UserError) as raised:
        AROptions(shared_classes=True, label_dropout=0.0).build(TokenLayout.grid(2, 2, (16,)), 17)
    assert str(raised.value) == (
        "shared classes are codes: 17 classes need a codebook of as many, not grid 2x2, 1 stream of 16 codes"
    )
