"""SimVQ against its formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from smalti.quant.simvq import SimVQ, SimVQOptions


def _build(**options: Any) -> SimVQ:
    torch.manual_seed(0)
    return SimVQOptions(**{"dim": 4, "codebook_size": 16, **options}).build()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen_dim", [None, 3])
def test_values_and_gradients_equal_the_plain_twin(bias: bool, frozen_dim: int | None) -> None:
    quantizer = _build(bias=bias, frozen_dim=frozen_dim, commitment_weight=0.3, codebook_weight=0.7).train()
    latent, probe = torch.randn(2, 3, 5, 4, requires_grad=True), torch.randn(2, 3, 5, 4)
    quantized = quantizer(latent)
    ((quantized.latent * probe).sum() + sum(quantized.losses.values())).backward()

    z = latent.detach().clone().requires_grad_()
    weight = quantizer.transform.weight.detach().clone().requires_grad_()
    offset = quantizer.transform.bias.detach().clone().requires_grad_() if bias else torch.zeros(4)
    table = quantizer.frozen @ weight.t() + offset
    q = table[(z.detach()[..., None, :] - table.detach()).square().sum(-1).argmin(-1)]
    losses = {
        "commitment": 0.3 * (q.detach() - z).square().mean(),
        "codebook": 0.7 * (q - z.detach()).square().mean(),
    }
    ((z * probe).sum() + sum(losses.values())).backward()
    assert quantized.losses.keys() == losses.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(quantized.losses[name], loss)
    torch.testing.assert_close(quantized.latent, q)
    torch.testing.assert_close(latent.grad, z.grad)
    torch.testing.assert_close(quantizer.transform.weight.grad, weight.grad)
    if bias:
        torch.testing.assert_close(quantizer.transform.bias.grad, offset.grad)


def test_gradients_of_the_losses_are_those_of_finite_differences() -> None:
    quantizer = _build(bias=True).double().train()
    latent = torch.randn(1, 6, 4, dtype=torch.float64)

    def codebook(weight: Tensor) -> Tensor:
        return torch.func.functional_call(quantizer, {"transform.weight": weight}, (latent,)).losses["codebook"]

    assert torch.autograd.gradcheck(codebook, (quantizer.transform.weight.detach().clone().requires_grad_(),))


def test_all_codes_move_and_the_frozen_ones_stay_to_the_last_bit() -> None:
    quantizer = _build().train()
    frozen, before = quantizer.frozen.clone(), quantizer.decode(torch.arange(16)[None, :, None], (16,))
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        losses = quantizer(torch.randn(2, 9, 4)).losses
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    assert torch.equal(quantizer.frozen, frozen)
    after = quantizer.decode(torch.arange(16)[None, :, None], (16,))
    assert bool((after != before).any(-1).all())


def test_single_tokens_decode_to_the_bits_of_all_of_them() -> None:
    quantizer = _build(dim=33, codebook_size=300, frozen_dim=17).eval()
    quantized = quantizer(torch.randn(3, 20, 33))
    alone = quantizer.decode(quantized.tokens[1:2, 7:8], (1,))
    assert torch.equal(alone[0, 0], quantized.latent[1, 7])
