"""The parts that quantizers share: estimator, clusters, moving averages."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from smalti.quant.clusters import cluster_sums, kmeans, shared_sample
from smalti.quant.ema import EmaStatistics
from smalti.quant.lookup import nearest_code
from smalti.quant.straight_through import straight_through


def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other() -> None:
    latent = (1000 * torch.randn(50, 7)).requires_grad_()
    codes = torch.randn(50, 7, requires_grad=True)
    probe = torch.randn(50, 7)
    output = straight_through(latent, codes)
    (output * probe).sum().backward()
    assert torch.equal(output, codes)
    assert latent.grad is not None
    assert torch.equal(latent.grad, probe)
    assert codes.grad is None


def test_straight_through_keeps_the_types_of_both() -> None:
    latent = torch.randn(5, 3, dtype=torch.bfloat16, requires_grad=True)
    output = straight_through(latent, torch.randn(5, 3))
    output.sum().backward()
    assert output.dtype == torch.float32
    assert latent.grad is not None
    assert latent.grad.dtype == torch.bfloat16


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
    means = kmeans(vectors, vectors[[0, 30, 60, 90]], iterations=5, cosine=cosine)
    expected = vectors.view(4, 30, 3).mean(1)
    torch.testing.assert_close(means, F.normalize(expected, dim=1) if cosine else expected)


def test_kmeans_never_gets_worse_and_leaves_empty_clusters() -> None:
    torch.manual_seed(0)
    vectors, means = torch.randn(300, 4), torch.cat([torch.randn(9, 4), torch.full((1, 4), 50.0)])

    def error(means: torch.Tensor) -> float:
        return F.mse_loss(vectors, means[nearest_code(vectors, means)]).item()

    errors = [error(kmeans(vectors, means, iterations, cosine=False)) for iterations in range(6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]
    assert kmeans(vectors, means, 5, cosine=False)[-1].tolist() == [50.0] * 4


def test_ema_follows_its_definition() -> None:
    torch.manual_seed(0)
    codebook, decay, eps = torch.randn(6, 3), 0.9, 1e-5
    statistics = EmaStatistics(codebook, decay)
    counts, sums = torch.ones(6), codebook.clone()
    for _ in range(3):
        tokens, vectors = torch.randint(5, (20,)), torch.randn(20, 3)
        found = statistics.update(tokens, vectors)
        one_hot = F.one_hot(tokens, 6).float()
        counts = decay * counts + (1 - decay) * one_hot.sum(0)
        sums = decay * sums + (1 - decay) * one_hot.t() @ vectors
        smoothed = (counts + eps) / (counts.sum() + 6 * eps) * counts.sum()
        torch.testing.assert_close(found, sums / smoothed[:, None])


def test_ema_restarts_single_codes() -> None:
    statistics = EmaStatistics(torch.randn(4, 2), 0.5)
    statistics.update(torch.tensor([0, 0, 1]), torch.randn(3, 2))
    kept = statistics.sums[[0, 1, 3]].clone()
    statistics.restart(torch.tensor([2]), torch.tensor([[7.0, 8.0]]))
    assert statistics.sums[2].tolist() == [7.0, 8.0]
    assert statistics.counts.tolist() == [1.5, 1.0, 1.0, 0.5]
    assert torch.equal(statistics.sums[[0, 1, 3]], kept)
