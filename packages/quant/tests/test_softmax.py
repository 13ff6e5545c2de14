"""Softmax over codes in blocks: the same as without blocks, and draws that follow the softmax."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from smalti.quant import softmax
from smalti.quant.entropy import distance_affinities, dot_affinities
from smalti.quant.softmax import best_code, expected_code


@pytest.mark.parametrize("affinities", [dot_affinities, distance_affinities])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_best_code_is_the_argmax(
    monkeypatch: pytest.MonkeyPatch, affinities: Callable[[Tensor], Callable[[Tensor], Tensor]], rows: int
) -> None:
    vectors, codebook = torch.randn(20, 4), torch.randn(9, 4)
    monkeypatch.setattr(softmax, "BLOCK", rows * 9)
    expected = affinities(codebook)(vectors).argmax(1)
    assert torch.equal(best_code(vectors, affinities(codebook), 9), expected)


def test_no_vectors_have_no_codes() -> None:
    codebook = torch.randn(9, 4)
    assert best_code(torch.zeros(0, 4), dot_affinities(codebook), 9).tolist() == []


def test_draws_follow_the_softmax() -> None:
    torch.manual_seed(0)
    codebook, vector = torch.randn(5, 3), torch.randn(1, 3)
    shares = torch.softmax(dot_affinities(codebook)(vector) / 0.5, dim=1)[0]
    drawn = best_code(vector.expand(40000, 3), dot_affinities(codebook), 5, temperature=0.5, noise_seed=torch.tensor(3))
    found = torch.bincount(drawn, minlength=5) / 40000
    torch.testing.assert_close(found, shares, atol=0.01, rtol=0)
    again = best_code(vector.expand(40000, 3), dot_affinities(codebook), 5, temperature=0.5, noise_seed=torch.tensor(3))
    assert torch.equal(drawn, again)
    other = best_code(vector.expand(40000, 3), dot_affinities(codebook), 5, temperature=0.5, noise_seed=torch.tensor(4))
    assert not torch.equal(drawn, other)


def test_the_mean_code_is_that_of_the_softmax_with_the_noise_of_the_draw() -> None:
    torch.manual_seed(0)
    codebook, vectors = torch.randn(5, 3), torch.randn(200, 3)
    affinities = distance_affinities(codebook)
    torch.testing.assert_close(
        expected_code(vectors, codebook, affinities, temperature=0.7),
        torch.softmax(affinities(vectors) / 0.7, dim=1) @ codebook,
    )
    # At a temperature near 0 the mean is the drawn code.
    drawn = best_code(vectors, affinities, 5, temperature=1e-3, noise_seed=torch.tensor(8))
    mean = expected_code(vectors, codebook, affinities, temperature=1e-3, noise_seed=torch.tensor(8))
    near = (mean - codebook[drawn]).abs().amax(1) < 1e-3
    assert near.float().mean() > 0.99


@pytest.mark.parametrize("noise_seed", [None, torch.tensor(5)])
def test_gradients_are_those_of_finite_differences_with_blocks(
    monkeypatch: pytest.MonkeyPatch, noise_seed: Tensor | None
) -> None:
    monkeypatch.setattr(softmax, "BLOCK", 2 * 6)
    vectors = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    codebook = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    averaged = torch.randn(6, 3, dtype=torch.float64)

    def mean(vectors: Tensor, codebook: Tensor) -> Tensor:
        return expected_code(vectors, averaged, dot_affinities(codebook), temperature=2.0, noise_seed=noise_seed)

    assert torch.autograd.gradcheck(mean, (vectors, codebook))
