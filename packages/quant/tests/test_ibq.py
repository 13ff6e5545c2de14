"""Index backpropagation against its formulas, and in memory for codebooks of 2^18."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from smalti.quant import softmax
from smalti.quant.entropy import affinity_entropy_plain
from smalti.quant.ibq import IndexBackpropagation, IndexBackpropagationOptions


def _build(**options: Any) -> IndexBackpropagation:
    torch.manual_seed(0)
    return IndexBackpropagationOptions(**{"dim": 4, "codebook_size": 16, **options}).build()


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_values_and_gradients_equal_the_plain_twin(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(softmax, "BLOCK", rows * 16)
    quantizer = _build(double_weight=0.5, commitment_weight=0.3, codebook_weight=0.7, entropy_temperature=0.5).train()
    latent, probe = torch.randn(2, 3, 5, 4, requires_grad=True), torch.randn(2, 3, 5, 4)
    quantized = quantizer(latent)
    total = sum(quantized.losses.values())
    ((quantized.latent * probe).sum() + total).backward()

    z, e = latent.detach().clone().requires_grad_(), quantizer.codebook.detach().clone().requires_grad_()
    logits = z.view(-1, 4) @ e.t()
    shares = logits.softmax(1)
    one_hot = F.one_hot(logits.argmax(1), 16).float()
    chosen = (one_hot @ e).view_as(z)
    output = ((one_hot + shares - shares.detach()) @ e).view_as(z)
    entropies = affinity_entropy_plain(logits, 0.5)
    losses = {
        "double": 0.5 * (output - z).square().mean(),
        "commitment": 0.3 * (chosen.detach() - z).square().mean(),
        "codebook": 0.7 * (chosen - z.detach()).square().mean(),
        "entropy": 0.05 * (entropies.sample - entropies.batch),
    }
    ((output * probe).sum() + sum(losses.values())).backward()
    assert quantized.losses.keys() == losses.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(quantized.losses[name], loss)
    torch.testing.assert_close(quantized.latent, output)
    torch.testing.assert_close(latent.grad, z.grad)
    torch.testing.assert_close(quantizer.codebook.grad, e.grad)
    assert bool((quantizer.codebook.grad != 0).all()), "every code learns from every token"


def test_a_large_codebook_never_meets_all_tokens_at_once(largest: Any) -> None:
    size = 2**18
    quantizer = _build(dim=2, codebook_size=size).eval()
    latent = torch.randn(1, 64, 2)
    with torch.no_grad(), largest:
        quantized = quantizer(latent)
    assert largest.elements == softmax.BLOCK < 64 * size
    plain = (latent[0].double() @ quantizer.codebook.double().t()).max(1).values
    found = (latent[0].double() * quantizer.codebook[quantized.tokens.flatten()].double()).sum(1)
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=0)
