"""How the codes of vector quantization learn: averages, the first batch, revival, affine moments."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError

from smalti.core.errors import UserError
from smalti.quant.lookup import nearest_code_plain
from smalti.quant.vector import VectorQuantizer

Build = Callable[..., VectorQuantizer]


def test_autocast_does_not_change_training(build_vq: Build) -> None:
    latent = torch.randn(4, 9, 4).bfloat16()
    plain, cast = (build_vq(update="ema", initialise="data").train() for _ in range(2))
    expected = plain(latent.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cast(latent)
    assert torch.equal(found.losses["commitment"], expected.losses["commitment"])
    assert torch.equal(cast.codebook, plain.codebook)


def test_ema_moves_codes_to_their_tokens_and_has_no_parameters(build_vq: Build, spread: Build) -> None:
    quantizer = spread(build_vq(update="ema", ema_decay=0.5)).train()
    assert not list(quantizer.parameters())
    latent = torch.randn(8, 25, 4)
    errors = [quantizer(latent).losses["commitment"].item() for _ in range(60)]
    assert errors[-1] < 0.8 * errors[0]
    quantized = quantizer.eval()(latent)
    for code in quantized.tokens.unique().tolist():
        mean = latent.flatten(0, 1)[quantized.tokens.flatten() == code].mean(0)
        torch.testing.assert_close(quantizer.codebook[code], mean, rtol=1e-2, atol=1e-2)


def test_cosine_ema_keeps_codes_of_unit_length(build_vq: Build) -> None:
    quantizer = build_vq(update="ema", cosine=True, ema_decay=0.5).train()
    before = quantizer.codebook.clone()
    quantizer(torch.randn(8, 25, 4))
    assert not torch.equal(quantizer.codebook, before)
    torch.testing.assert_close(quantizer.codebook.norm(dim=1), torch.ones(16))


@pytest.mark.parametrize("update", ["loss", "ema"])
def test_initialising_by_data_uses_every_code_from_the_first_batch_on(build_vq: Build, update: str) -> None:
    latent = 100 + torch.randn(8, 25, 4)
    data, uniform = (build_vq(update=update, initialise=name).train() for name in ("data", "uniform"))
    first = data(latent)
    assert len(first.tokens.unique()) == 16
    assert first.losses["commitment"] < 1e-3 * uniform(latent).losses["commitment"]
    assert bool(data.learning.initialised)
    again = data.codebook.detach().clone()
    data.eval()(-latent)
    assert torch.equal(data.codebook, again)


def test_initialising_by_data_happens_once(build_vq: Build) -> None:
    quantizer = build_vq(initialise="data").train()
    quantizer(torch.randn(8, 25, 4))
    codebook = quantizer.codebook.detach().clone()
    quantizer(100 + torch.randn(8, 25, 4))
    assert torch.equal(quantizer.codebook, codebook)


def test_evaluation_before_training_does_not_initialise(build_vq: Build) -> None:
    quantizer = build_vq(initialise="data").eval()
    codebook = quantizer.codebook.detach().clone()
    quantizer(torch.randn(8, 25, 4))
    assert torch.equal(quantizer.codebook, codebook)
    assert not bool(quantizer.learning.initialised)


@pytest.mark.parametrize("update", ["loss", "ema"])
def test_a_code_is_revived_after_exactly_so_many_unused_batches(build_vq: Build, place: Build, update: str) -> None:
    quantizer = build_vq(update=update, revive_after=3, codebook_size=2, dim=1).train()
    place(quantizer, torch.tensor([[0.0], [1000.0]]))
    batches = [torch.full((1, 4, 1), float(value)) for value in (1, 2, 3, 4)]
    for batch in batches[:3]:
        assert quantizer(batch).tokens.flatten().tolist() == [0] * 4
    assert quantizer.learning.revival.unused.tolist() == [0, 3]
    assert quantizer(batches[3]).tokens.flatten().tolist() == [1] * 4
    assert quantizer.learning.revival.unused.tolist() == [1, 0]
    assert quantizer.codebook[1].item() == pytest.approx(4.0, rel=1e-4)


def test_every_revival_draws_anew(build_vq: Build) -> None:
    quantizer = build_vq(revive_after=1, codebook_size=2, dim=1).train()
    batch, drawn = torch.arange(100.0).view(1, 100, 1), set()
    for _ in range(5):
        quantizer.learning.revival.unused.copy_(torch.tensor([0, 1]))
        quantizer(batch)
        drawn.add(quantizer.codebook[1].item())
    assert len(drawn) > 2
    assert drawn <= set(range(100))


def test_a_code_in_use_is_never_revived(build_vq: Build, place: Build) -> None:
    quantizer = place(build_vq(revive_after=1, codebook_size=2, dim=1).train(), torch.tensor([[0.0], [10.0]]))
    for _ in range(5):
        quantizer(torch.tensor([[[1.0], [11.0]]]))
    assert quantizer.codebook.flatten().tolist() == [0.0, 10.0]


def test_revival_between_forward_and_backward_does_no_harm(build_vq: Build) -> None:
    quantizer = build_vq(revive_after=1, cosine=True).train()
    first, second = (quantizer(torch.randn(2, 3, 4)) for _ in range(2))
    torch.stack([*first.losses.values(), *second.losses.values()]).sum().backward()
    assert quantizer.codebook.grad is not None
    assert bool(quantizer.codebook.grad.any())


def test_revival_raises_usage(build_vq: Build) -> None:
    used = {}
    for revive_after in (None, 2):
        quantizer = build_vq(revive_after=revive_after, codebook_size=64, update="ema").train()
        for _ in range(10):
            quantizer(3 + torch.randn(8, 25, 4))
        used[revive_after] = len(quantizer.eval()(3 + torch.randn(8, 25, 4)).tokens.unique())
    assert used[2] > 40 > used[None]


def test_a_code_is_revived_at_once_when_its_count_falls_below(build_vq: Build, place: Build) -> None:
    quantizer = build_vq(update="ema", ema_decay=0.5, revive_below=0.3, codebook_size=2, dim=1).train()
    place(quantizer, torch.tensor([[0.0], [1000.0]]))
    counts = []
    for value in (1.0, 2.0, 3.0):
        quantizer(torch.full((1, 4, 1), value))
        counts.append(quantizer.learning.ema.counts[1].item())
    assert counts == [0.5, pytest.approx(0.3), pytest.approx(0.15 + 2)]
    assert quantizer.codebook[1].item() == pytest.approx((0.15 * 2 + 2 * 3) / 2.15, rel=1e-3)


def test_data_initialises_the_statistics_with_the_sizes_of_the_clusters(
    build_vq: Build,
) -> None:
    quantizer = build_vq(update="ema", ema_decay=0.5, initialise="data", codebook_size=2, dim=1).train()
    quantizer(torch.tensor([[[0.0], [10.0], [12.0], [14.0]]]))
    order = quantizer.codebook.flatten().argsort()
    torch.testing.assert_close(quantizer.learning.ema.counts[order], torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(quantizer.learning.ema.sums.flatten()[order], torch.tensor([0.0, 36.0]))


def test_without_smoothing_only_codes_in_use_are_rewritten(build_vq: Build, spread: Build) -> None:
    quantizer = spread(build_vq(update="ema", ema_decay=0.5, ema_smoothing=False)).train()
    before, latent = quantizer.codebook.clone(), torch.randn(1, 5, 4)
    used = quantizer(latent).tokens.unique()
    idle = torch.ones(16, dtype=torch.bool).index_fill(0, used, False)
    assert torch.equal(quantizer.codebook[idle], before[idle])
    averages = quantizer.learning.ema.sums / quantizer.learning.ema.counts[:, None]
    torch.testing.assert_close(quantizer.codebook[used], averages[used])
    assert not bool((quantizer.codebook[used] == before[used]).any())


@pytest.mark.parametrize("cosine", [False, True])
def test_codes_that_nothing_updates_stay_to_the_last_bit(build_vq: Build, cosine: bool) -> None:
    quantizer = build_vq(update="none", initialise="normal", cosine=cosine).train()
    before = quantizer.codebook.clone()
    assert not list(quantizer.parameters())
    losses = [quantizer(torch.randn(2, 9, 4)).losses for _ in range(3)]
    assert {name for terms in losses for name in terms} == {"commitment"}
    assert torch.equal(quantizer.codebook, before)


def test_affine_codes_follow_the_tokens_although_none_is_chosen(build_vq: Build) -> None:
    quantizer = build_vq(affine=True, update="ema").train()
    latent = 100 + 10 * torch.randn(4, 25, 4)
    usage = len(quantizer(latent).tokens.unique())
    plain = len(build_vq(update="ema").train()(latent).tokens.unique())
    assert usage > 10 > plain
    for _ in range(20):
        quantizer(latent)
    codes = quantizer.eval()(latent).latent.detach()
    assert (codes - latent).square().mean() < 0.5 * latent.var()


def test_given_tokens_take_the_place_of_the_search(build_vq: Build, spread: Build) -> None:
    quantizer = spread(build_vq(update="ema", ema_decay=0.5)).train()
    before, latent = quantizer.codebook.clone(), torch.randn(2, 3, 3, 4)
    tokens = torch.full((2, 9, 1), 5)
    quantized = quantizer(latent, tokens)
    assert torch.equal(quantized.tokens, tokens)
    assert torch.equal(quantized.latent, before[5].expand(2, 3, 3, 4))
    torch.testing.assert_close(quantizer.learning.ema.counts[[4, 5]], torch.tensor([0.5, 0.5 + 0.5 * 18]))
    with pytest.raises(UserError) as error:
        quantizer(latent, tokens + 11)
    assert str(error.value) == "token 16 of stream 0 is out of range: there are 16 codes, 0 to 15"


def test_deferred_learning_averages_in_turn_and_writes_once(build_vq: Build, spread: Build) -> None:
    quantizer = spread(build_vq(update="ema", revive_after=3)).train()
    before, expected = quantizer.codebook.clone(), copy.deepcopy(quantizer.learning.ema)
    parts = torch.randn(4, 9, 4).split((1, 3))
    hits = torch.zeros(len(before), dtype=torch.int64)
    with quantizer.deferred():
        for latent in parts:
            tokens = quantizer(latent).tokens.flatten()
            assert torch.equal(tokens, nearest_code_plain(latent.flatten(0, 1), before))
            assert torch.equal(quantizer.codebook, before)
            expected.update(tokens, latent.flatten(0, 1))
            hits += torch.bincount(tokens, minlength=len(before))
    torch.testing.assert_close(quantizer.codebook, expected.codebook())
    torch.testing.assert_close(quantizer.learning.ema.counts, expected.counts)
    assert torch.equal(quantizer.learning.revival.unused == 0, hits > 0)


def test_a_failed_deferral_learns_nothing(build_vq: Build, spread: Build) -> None:
    quantizer = spread(build_vq(update="ema")).train()
    before = quantizer.codebook.clone()
    with pytest.raises(UserError), quantizer.deferred():
        quantizer(torch.cat([quantizer(torch.randn(1, 9, 4)).latent] * 2, dim=2))
    assert torch.equal(quantizer.codebook, before)
    quantizer(torch.randn(1, 9, 4))
    assert not torch.equal(quantizer.codebook, before)


def test_an_anchored_code_that_nothing_uses_becomes_its_nearest_token(build_vq: Build, place: Build) -> None:
    quantizer = place(
        build_vq(anchor_decay=0.5, codebook_size=2, dim=1, update="loss").train(), torch.tensor([[0.0], [10.0]])
    )
    latent = torch.tensor([[[0.1], [-0.2], [2.0]]])
    assert quantizer(latent).tokens.flatten().tolist() == [0, 0, 0]
    first, second = quantizer.codebook.flatten().tolist()
    # Usage is 1/2 and 0: pulls are exp(-10 * 2 * 0.5 / 0.5 - 0.001), next to nothing, and exp(-0.001).
    assert first == pytest.approx(0.0, abs=1e-8)
    assert second == pytest.approx(10.0 + math.exp(-1e-3) * (2.0 - 10.0), abs=1e-5)
    assert quantizer.learning.anchors is not None
    assert quantizer.learning.anchors.usage.tolist() == [0.5, 0.0]


def test_anchors_are_those_of_the_codes_that_were_searched(build_vq: Build, place: Build) -> None:
    quantizer = build_vq(update="ema", ema_decay=0.5, anchor_decay=0.5, codebook_size=3, dim=1).train()
    place(quantizer, torch.tensor([[0.0], [10.0], [12.0]]))
    latent = torch.tensor([8.0, 11.5, *[0.0] * 98]).view(1, 100, 1)
    assert quantizer(latent).tokens.flatten().tolist() == [1, 2] + [0] * 98
    # The average of 10 and its token 8 is pulled to 11.5, the token nearest to 10, though 8 is nearer to 9.
    pull = math.exp(-10 * 3 / 100 - 1e-3)
    assert quantizer.codebook[1].item() == pytest.approx(9 + pull * (11.5 - 9), abs=1e-3)


@pytest.mark.parametrize("options", [{"update": "none"}, {"affine": True}])
def test_anchors_need_codes_that_may_move(build_vq: Build, options: dict) -> None:
    with pytest.raises(ValidationError, match="anchor_decay changes codes: it needs update: loss or ema"):
        build_vq(anchor_decay=0.9, **options)
