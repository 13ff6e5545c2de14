"""The parts that vector quantizers share: clusters, moving averages, revival, regularisers, masks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from smalti.core.errors import UserError
from smalti.quant.affine import AffineCodebook
from smalti.quant.alternated import fit_codes
from smalti.quant.clusters import cluster_sums, kmeans, shared_sample
from smalti.quant.ema import EmaStatistics
from smalti.quant.lookup import nearest_code
from smalti.quant.masked import quantize_masked
from smalti.quant.orthogonal import diversity_loss, orthogonal_loss
from smalti.quant.projected import ProjectedOptions
from smalti.quant.revival import Revival, revive
from smalti.quant.simvq import SimVQOptions
from smalti.quant.vector import VectorQuantizerOptions


def test_cluster_sums_are_sums_by_code() -> None:
    tokens, vectors = torch.tensor([3, 0, 3, 3]), torch.tensor([[1.0, 2], [4, 8], [16, 32], [64, 128]])
    sums, counts = cluster_sums(tokens, vectors, 5)
    assert sums.tolist() == [[4, 8], [0, 0], [0, 0], [81, 162], [0, 0]]
    assert counts.tolist() == [1, 0, 0, 3, 0]


def test_shared_sample_draws_without_replacement_where_it_can() -> None:
    vectors = torch.arange(20.0)[:, None]
    drawn = shared_sample(vectors, 20, seed=1).flatten()
    assert drawn.sort().values.tolist() == list(range(20))
    assert shared_sample(vectors, 50, seed=1).shape == (50, 1)
    assert not torch.equal(drawn, shared_sample(vectors, 20, seed=2).flatten())


def test_shared_sample_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    shared_sample(torch.zeros(10, 2), 3, seed=5)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("cosine", [False, True])
def test_kmeans_finds_separate_clusters(cosine: bool) -> None:
    torch.manual_seed(0)
    centres = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [-1, 0, 0]])
    members = centres.repeat_interleave(30, 0) + 0.01 * torch.randn(120, 3)
    vectors = F.normalize(members, dim=1) if cosine else members
    means, counts = kmeans(vectors, vectors[[0, 30, 60, 90]], iterations=5, cosine=cosine)
    assert counts.tolist() == [30] * 4
    expected = vectors.view(4, 30, 3).mean(1)
    torch.testing.assert_close(means, F.normalize(expected, dim=1) if cosine else expected)


def test_kmeans_never_gets_worse_and_leaves_empty_clusters() -> None:
    torch.manual_seed(0)
    vectors, means = torch.randn(300, 4), torch.cat([torch.randn(9, 4), torch.full((1, 4), 50.0)])

    def error(means: torch.Tensor) -> float:
        return F.mse_loss(vectors, means[nearest_code(vectors, means)]).item()

    errors = [error(kmeans(vectors, means, iterations, cosine=False)[0]) for iterations in range(6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]
    assert kmeans(vectors, means, 5, cosine=False)[0][-1].tolist() == [50.0] * 4


def test_ema_follows_its_definition() -> None:
    torch.manual_seed(0)
    codebook, decay, eps = torch.randn(6, 3), 0.9, 1e-5
    statistics = EmaStatistics(codebook, decay)
    counts, sums = torch.ones(6), codebook.clone()
    for _ in range(3):
        tokens, vectors = torch.randint(5, (20,)), torch.randn(20, 3)
        found_counts = statistics.update(tokens, vectors)
        one_hot = F.one_hot(tokens, 6).float()
        counts = decay * counts + (1 - decay) * one_hot.sum(0)
        sums = decay * sums + (1 - decay) * one_hot.t() @ vectors
        smoothed = (counts + eps) / (counts.sum() + 6 * eps) * counts.sum()
        assert torch.equal(found_counts, one_hot.sum(0))
        torch.testing.assert_close(statistics.codebook(), sums / smoothed[:, None])
        torch.testing.assert_close(statistics.codebook(smoothing=False), sums / counts[:, None])


def test_revival_counts_batches_in_a_row() -> None:
    revival = Revival(3)
    for counts in ([1, 0, 0], [0, 0, 2], [0, 0, 0]):
        revival.note(torch.tensor(counts))
    assert revival.unused.tolist() == [2, 3, 1]
    assert revival.step == 3


def test_revived_codes_are_tokens_and_their_statistics_start_again() -> None:
    tokens, codebook, unused = torch.arange(100.0).view(50, 2), torch.full((4, 2), -1.0), torch.tensor([3, 0, 3, 0])
    counts, sums = torch.full((4,), 9.0), torch.full((4, 2), 9.0)
    dead = torch.tensor([True, False, True, False])
    revive(dead, tokens, torch.tensor(7), unused, codebook, counts, sums, 2.0)
    assert unused.tolist() == [0] * 4
    assert counts.tolist() == [2.0, 9.0, 2.0, 9.0]
    assert codebook[[1, 3]].unique().tolist() == [-1.0]
    assert sums[[1, 3]].unique().tolist() == [9.0]
    assert all(code in tokens.tolist() for code in codebook[[0, 2]].tolist())
    assert torch.equal(sums[[0, 2]], 2 * codebook[[0, 2]])


def test_affine_codes_have_the_moments_of_the_tokens() -> None:
    torch.manual_seed(0)
    affine, codebook = AffineCodebook(3), torch.randn(50, 3)
    tokens = torch.tensor([5.0, 0, -5]) + torch.tensor([1.0, 2, 3]) * torch.randn(400, 3)
    affine.observe(tokens, codebook)
    used = affine(codebook)
    torch.testing.assert_close(used.mean(0), tokens.mean(0))
    torch.testing.assert_close(used.var(0, unbiased=False), tokens.var(0, unbiased=False))
    torch.testing.assert_close(affine.inverse(used), codebook)


def test_affine_moments_move_with_their_decays() -> None:
    affine, codebook = AffineCodebook(1, batch_decay=0.75, codebook_decay=0.5), torch.tensor([[0.0], [2.0]])
    affine.observe(torch.tensor([[1.0], [3.0]]), codebook)
    assert [affine.batch_mean.item(), affine.batch_variance.item()] == [2.0, 1.0]
    affine.observe(torch.tensor([[6.0], [6.0]]), codebook + 10)
    assert [affine.batch_mean.item(), affine.batch_variance.item()] == [3.0, 0.75]
    assert [affine.codebook_mean.item(), affine.codebook_variance.item()] == [6.0, 1.0]


def test_orthogonal_loss_is_zero_for_a_basis_and_that_of_all_pairs() -> None:
    assert orthogonal_loss(3 * torch.eye(4)).item() == pytest.approx(0.0)
    assert orthogonal_loss(torch.ones(4, 4)).item() == pytest.approx(1 - 1 / 4)
    codebook = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    cosines = torch.cosine_similarity(codebook[:, None], codebook[None], dim=-1)
    torch.testing.assert_close(orthogonal_loss(codebook), (cosines**2).mean() - 1 / 7)
    assert torch.autograd.gradcheck(orthogonal_loss, (codebook,))
    several = torch.randn(3, 7, 5)
    torch.testing.assert_close(
        orthogonal_loss(several), torch.stack([orthogonal_loss(some) for some in several]).mean()
    )


def test_diversity_loss_is_least_where_every_position_uses_all_codes() -> None:
    one = torch.tensor([0.0, 100, 100])
    spread = torch.stack([one, one.roll(1), one.roll(2)])[:, None]
    assert diversity_loss(spread, 1.0).item() == pytest.approx(-math.log(3), rel=1e-5)
    # The same codes at the same position in the whole batch, however many the positions use together.
    assert diversity_loss(spread.transpose(0, 1), 1.0).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("update", ["loss", "ema"])
def test_masked_positions_are_not_seen(update: str) -> None:
    torch.manual_seed(0)
    options = VectorQuantizerOptions(dim=4, codebook_size=8, update=update, initialise="normal")
    quantizer = options.build().train()
    twin = options.build().train()
    twin.load_state_dict(quantizer.state_dict())
    mask = torch.tensor([[True, True, False, False], [True, True, True, False]])
    latent = torch.randn(2, 4, 4)
    wrong = torch.where(mask[..., None], latent, torch.full((), float("nan"))).requires_grad_()
    masked = quantize_masked(quantizer, wrong, mask)
    plain = twin(latent[mask][None])
    assert masked.tokens.shape == (2, 4, 1)
    assert masked.tokens[~mask].unique().tolist() == [-1]
    assert torch.equal(masked.tokens[mask], plain.tokens[0])
    assert torch.equal(masked.latent[mask], plain.latent[0])
    assert not bool(masked.latent[~mask].any())
    assert torch.equal(masked.losses["commitment"], plain.losses["commitment"])
    (masked.latent.sum() + masked.losses["commitment"]).backward()
    assert wrong.grad is not None
    assert not bool(wrong.grad[~mask].any())
    assert torch.equal(quantizer.codebook, twin.codebook)


def test_a_mask_that_does_not_fit_is_told() -> None:
    quantizer = VectorQuantizerOptions(dim=4, codebook_size=8).build()
    with pytest.raises(UserError) as error:
        quantize_masked(quantizer, torch.zeros(2, 5, 4), torch.zeros(2, 4, dtype=torch.bool))
    assert str(error.value) == (
        "a mask over a latent (B, L, D) must be bool (B, L), got torch.bool (2, 4) for a latent of (2, 5, 4)"
    )


def test_fitting_codes_moves_them_and_nothing_else() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizerOptions(dim=4, codebook_size=8, initialise="normal").build().train()
    latent = torch.randn(2, 5, 4, requires_grad=True)
    quantizer.codebook.grad = kept = torch.ones(8, 4)
    optimizer = torch.optim.SGD([quantizer.codebook], lr=1.0)
    errors = [fit_codes(quantizer, latent, optimizer).item() for _ in range(20)]
    assert errors[-1] < 0.5 * errors[0]
    assert quantizer.training
    assert quantizer.codebook.grad is kept
    assert latent.grad is None


def test_fitting_works_for_codes_behind_a_map() -> None:
    torch.manual_seed(0)
    quantizer = SimVQOptions(dim=4, codebook_size=8).build().train()
    frozen, latent = quantizer.frozen.clone(), torch.randn(2, 5, 4)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.3)
    errors = [fit_codes(quantizer, latent, optimizer).item() for _ in range(20)]
    assert errors[-1] < 0.95 * errors[0]
    assert torch.equal(quantizer.frozen, frozen)


def test_fitting_leaves_weights_alone_that_make_no_codes() -> None:
    torch.manual_seed(0)
    unit = VectorQuantizerOptions(dim=3, codebook_size=8, initialise="normal")
    quantizer = ProjectedOptions(dim=4, quantizer=unit).build().train()
    before, latent = quantizer.project_in.weight.detach().clone(), torch.randn(2, 5, 4)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.3)
    errors = [fit_codes(quantizer, latent, optimizer).item() for _ in range(20)]
    assert errors[-1] < 0.95 * errors[0]
    assert torch.equal(quantizer.project_in.weight, before)


def test_codes_that_nothing_fits_are_told() -> None:
    quantizer = VectorQuantizerOptions(dim=4, codebook_size=8, update="ema").build()
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    with pytest.raises(UserError) as error:
        fit_codes(quantizer, torch.zeros(1, 1, 4), optimizer)
    assert str(error.value) == "the codes of 'vq' have no weights that an optimizer could fit"
