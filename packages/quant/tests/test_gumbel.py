"""Gumbel-softmax quantization: draws, gradients and the divergence from uniform use."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from smalti.quant.gumbel import GumbelOptions, GumbelQuantizer


def _build(**options: float) -> GumbelQuantizer:
    torch.manual_seed(0)
    return GumbelOptions(dim=4, codebook_size=12, **options).build()


def test_evaluation_takes_the_largest_logit() -> None:
    quantizer, latent = _build().eval(), torch.randn(2, 3, 5, 4)
    tokens = (latent @ quantizer.logits.weight.t() + quantizer.logits.bias).argmax(-1)
    quantized = quantizer(latent)
    assert torch.equal(quantized.tokens.view(2, 3, 5), tokens)
    assert torch.equal(quantized.latent, quantizer.codebook[tokens])


def test_draws_follow_the_softmax_whatever_the_temperature() -> None:
    quantizer = _build(temperature=0.3).train()
    latent = torch.randn(4)
    tokens = quantizer(latent.expand(1, 20000, 4)).tokens.flatten()
    shares = torch.bincount(tokens, minlength=12) / 20000
    torch.testing.assert_close(shares, quantizer.logits(latent).softmax(0).detach(), atol=0.015, rtol=0)


def test_gradients_are_those_of_a_softmax_at_the_draw() -> None:
    quantizer = _build(kl_weight=0, temperature=1e3).train()
    latent, probe = torch.randn(1, 50, 4, requires_grad=True), torch.randn(1, 50, 4)
    quantized = quantizer(latent)
    (quantized.latent * probe).sum().backward()
    assert torch.equal(quantized.latent, quantizer.decode(quantized.tokens, (50,)))
    # So hot a softmax is uniform, noise or not: d mean / d logit_k = (e_k - mean e) / (K T).
    codes = quantizer.codebook.detach()
    to_logits = probe[0] @ (codes - codes.mean(0)).t() / (12 * 1e3)
    torch.testing.assert_close(latent.grad[0], to_logits @ quantizer.logits.weight, rtol=0.1, atol=1e-5)
    used = torch.zeros(12, 4).index_add(0, quantized.tokens.flatten(), probe[0])
    torch.testing.assert_close(quantizer.codebook.grad, used)


def test_the_temperature_falls_along_half_a_cosine() -> None:
    quantizer, latent = _build(temperature=2.0, final_temperature=0.5, temperature_steps=4), torch.randn(1, 5, 4)
    found = []
    for _ in range(6):
        quantizer.eval()(latent)
        found.append(float(quantizer.temperature))
        quantizer.train()(latent)
    expected = [0.5 + 0.75 * (1 + math.cos(math.pi * min(step / 4, 1))) for step in range(6)]
    torch.testing.assert_close(found, expected)


def test_a_fallen_temperature_is_one_that_always_was() -> None:
    fallen, always = _build(final_temperature=0.2, temperature_steps=2).train(), _build(temperature=0.6).train()
    assert always.state_dict().keys() == fallen.state_dict().keys() - {"step"}
    latent, probe = torch.randn(1, 50, 4), torch.randn(1, 50, 4)
    fallen(latent)
    gradients = []
    for quantizer in (fallen, always):
        torch.manual_seed(7)
        quantizer.zero_grad()
        (quantizer(latent).latent * probe).sum().backward()
        gradients.append(quantizer.logits.weight.grad)
    assert bool(gradients[0].any())
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_divergence_is_its_definition() -> None:
    quantizer, latent = _build(kl_weight=0.7).train(), torch.randn(2, 9, 4, requires_grad=True)
    twin = latent.detach().clone().requires_grad_()
    loss = quantizer(latent).losses["kl"]
    logits = quantizer.logits(twin)
    expected = 0.7 * (logits.softmax(-1) * (logits.log_softmax(-1) + math.log(12))).sum(-1).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(latent.grad, twin.grad)
    with torch.no_grad():
        quantizer.logits.weight.zero_()
        quantizer.logits.bias.zero_()
    torch.testing.assert_close(quantizer(latent).losses["kl"], torch.zeros(()), atol=1e-6, rtol=0)


def test_draws_learn_a_task() -> None:
    quantizer = _build(temperature=0.5).train()
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.05)
    latent = F.one_hot(torch.arange(4)).float().repeat(1, 16, 1)
    errors = []
    for _ in range(60):
        quantized = quantizer(latent)
        error = F.mse_loss(quantized.latent, latent)
        optimizer.zero_grad()
        (error + quantized.losses["kl"]).backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.3 * errors[0]
