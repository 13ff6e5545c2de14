"""Entropy regularisation: the lean forms against their definitions, in value and gradient."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smalti.core.errors import UserError
from smalti.quant.entropy import (
    Entropies,
    LogFloor,
    affinity_entropy,
    affinity_entropy_plain,
    bits_entropy,
    bits_entropy_plain,
    distance_affinities,
    dot_affinities,
)

FLOORS: tuple[LogFloor, ...] = ("add", "clamp")


def _same(found: Entropies, expected: Entropies, *inputs: Tensor, rtol: float = 1e-9) -> None:
    """Both entropies and their gradients with respect to all inputs."""
    for lean, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(lean, plain, rtol=rtol, atol=1e-12)
        pairs = zip(
            torch.autograd.grad(lean, inputs, retain_graph=True),
            torch.autograd.grad(plain, inputs, retain_graph=True),
            strict=True,
        )
        for lean_gradient, plain_gradient in pairs:
            torch.testing.assert_close(lean_gradient, plain_gradient, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("floor", FLOORS)
@pytest.mark.parametrize("block", [1, 100, 1 << 20])
@pytest.mark.parametrize("kind", ["dot", "distance"])
def test_affinity_entropy_is_the_definition(floor: LogFloor, block: int, kind: str) -> None:
    torch.manual_seed(0)
    vectors = torch.randn(23, 5, dtype=torch.float64, requires_grad=True)
    codebook = torch.randn(40, 5, dtype=torch.float64, requires_grad=True)
    if kind == "dot":
        affinities, whole = dot_affinities(codebook), vectors @ codebook.t()
    else:
        affinities = distance_affinities(codebook)
        whole = -(vectors[:, None] - codebook[None]).square().sum(2)
    found = affinity_entropy(vectors, affinities, 0.3, floor=floor, block=block)
    _same(found, affinity_entropy_plain(whole, 0.3, floor=floor), vectors, codebook)


def test_affinity_entropy_keeps_no_table_of_tokens_by_codes() -> None:
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    vectors = torch.randn(64, 4, requires_grad=True)
    codebook = torch.randn(4096, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        affinity_entropy(vectors, dot_affinities(codebook), block=4 * 4096).loss().backward()
    assert max(saved) <= 4 * 4096


@given(bits=st.integers(1, 7), tokens=st.integers(1, 9), scale=st.sampled_from([0.01, 1.0, 30.0]))
@settings(deadline=None, max_examples=25)
@pytest.mark.parametrize("floor", FLOORS)
def test_bits_entropy_is_the_softmax_over_all_strings(floor: LogFloor, bits: int, tokens: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(bits + 10 * tokens)
    logits = scale * torch.randn(tokens, bits, dtype=torch.float64, generator=generator)
    logits.requires_grad_()
    _same(bits_entropy(logits, floor=floor), bits_entropy_plain(logits, floor=floor), logits, rtol=1e-7)


def test_bits_entropy_is_that_of_affinities_to_codes() -> None:
    torch.manual_seed(0)
    latent, scale, temperature = torch.randn(17, 6, dtype=torch.float64, requires_grad=True), 0.7, 0.4
    codes = scale * (2.0 * ((torch.arange(64)[:, None] >> torch.arange(6)) & 1) - 1).double()
    table = affinity_entropy_plain(2 * latent @ codes.t(), temperature)
    _same(bits_entropy(4 * scale * latent / temperature), table, latent)


def test_gradients_of_bits_entropy() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda logits: bits_entropy(logits, group=3), logits)


def test_groups_are_separate_codebooks() -> None:
    torch.manual_seed(0)
    logits = torch.randn(30, 6, dtype=torch.float64)
    parts = [bits_entropy_plain(part) for part in logits.split(2, dim=1)]
    found = bits_entropy(logits, group=2)
    torch.testing.assert_close(found.sample, sum(part.sample for part in parts))
    torch.testing.assert_close(found.batch, sum(part.batch for part in parts))


def test_single_bits_are_the_analytic_form() -> None:
    torch.manual_seed(0)
    logits = torch.randn(30, 6, dtype=torch.float64)
    mean = torch.sigmoid(logits).mean(0)
    expected = -(mean * mean.log() + (1 - mean) * (1 - mean).log()).sum()
    torch.testing.assert_close(bits_entropy(logits, group=1).batch, expected, rtol=1e-4, atol=0.0)


def test_larger_groups_see_more() -> None:
    torch.manual_seed(0)
    common = torch.randn(200, 1, dtype=torch.float64)
    logits = (common + 0.1 * torch.randn(200, 8, dtype=torch.float64)) * 10
    figures = [bits_entropy(logits, group=group, floor="clamp").batch.item() for group in (8, 4, 2, 1)]
    assert figures == sorted(figures)
    assert figures[-1] > 2 * figures[0]


def test_extremes() -> None:
    sure = bits_entropy(torch.full((4, 3), 500.0))
    assert sure.sample.item() == 0
    assert abs(sure.batch.item()) < 1e-4
    open_ = bits_entropy(torch.zeros(4, 3))
    assert open_.sample.item() == pytest.approx(3 * math.log(2))
    assert open_.batch.item() == pytest.approx(3 * math.log(2), abs=1e-3)
    split = bits_entropy(torch.tensor([[500.0], [-500.0]]))
    assert split.loss().item() == pytest.approx(-math.log(2), abs=1e-3)
    assert split.loss(2, 3).item() == pytest.approx(-3 * math.log(2), abs=1e-3)


def test_a_group_that_does_not_divide_is_told() -> None:
    with pytest.raises(UserError, match="the entropy's group of 4 bits must divide the 6 bits of a code"):
        bits_entropy(torch.zeros(2, 6), group=4)
