"""Alternated optimisation: the codes take a step of their own before everything else does (Huh et al. 2023)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.core.contracts import Quantizer
from smalti.core.distributed import all_reduce_sum, world_size
from smalti.core.errors import UserError


def fit_codes(quantizer: Quantizer, latent: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """One optimizer step on the mean squared distance between the latent and its codes; the latent stays.

    Call it before the forward pass of a training step, with weights of 0 for the quantizer's own codebook loss.
    Gradients that the weights have already are kept.

    Args:
        quantizer: one whose codes are learned by gradient, not wrapped for distributed training: gradients are averaged
            over processes here.
        latent: float `(B, *space, D)`.
        optimizer: of the quantizer's weights.

    Returns:
        The mean squared distance before the step, a scalar without gradient.

    Raises:
        UserError: a quantizer without weights.
    """
    weights = [weight for weight in quantizer.parameters() if weight.requires_grad]
    if not weights:
        raise UserError(f"the codes of {quantizer.options.name!r} have no weights that an optimizer could fit")
    training = quantizer.training
    with torch.no_grad():
        tokens = quantizer.eval()(latent).tokens
    quantizer.train(training)
    error = F.mse_loss(quantizer.decode(tokens, tuple(latent.shape[1:-1])), latent.detach())
    # Weights that make no codes, as those of a projection in front, have no gradient.
    gradients = torch.autograd.grad(error, weights, allow_unused=True)
    kept = [weight.grad for weight in weights]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = None if gradient is None else all_reduce_sum(gradient) / world_size()
    optimizer.step()
    for weight, before in zip(weights, kept, strict=True):
        weight.grad = before
    return error.detach()
