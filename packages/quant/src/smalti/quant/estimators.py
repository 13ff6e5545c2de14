"""Gradient estimators: what the choice of a code, which has no derivative, is taken to be in the backward pass.

Every one of them but DiVeQ's noise has exactly the value of the codes, so that decoding the tokens gives the same
bits. (The usual form, latent + sg(codes - latent), is off by a rounding error.) Where a latent is not finite, so is
the result.

Legend: D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Below this length a token has no direction, and the ratio of lengths means nothing.
SHORTEST = 1e-6


def straight_through(latent: Tensor, codes: Tensor) -> Tensor:
    """The value of `codes` with the gradient of the identity on `latent` (Bengio et al. 2013; VQ-VAE, section 3.1).

    Args:
        latent: what was quantized, any shape.
        codes: what it was quantized to, the same shape; receives no gradient.

    Returns:
        A tensor of the dtype of `codes`.
    """
    return gradient_of(latent, codes.dtype).add_(codes.detach())


def rotation_trick(latent: Tensor, codes: Tensor) -> Tensor:
    """The value of `codes` with the gradient of turning and scaling each token onto its code (Fifty et al. 2024).

    With x the token, q its code, u = x/|x|, v = q/|q| and w = (u + v)/|u + v|, the code is
    |q|/|x| (x - 2 w w.x + 2 v u.x), in which all but the linear x counts as constant (a product of two
    Householder reflections). A token without a direction gets the straight-through gradient.

    Args:
        latent: float `(..., D)`.
        codes: float `(..., D)`; receives no gradient.

    Returns:
        A tensor of the dtype of `codes`.
    """
    turned: Tensor = _rotation(latent, codes.detach())
    return turned


# An operator with a gradient of its own keeps token and code only, as the commitment loss does; the formula
# would keep their directions as well.
@torch.library.custom_op("smalti::rotation", mutates_args=())
def _rotation(latent: Tensor, codes: Tensor) -> Tensor:
    return (latent - latent).to(codes.dtype).add_(codes)


@_rotation.register_fake
def _(latent: Tensor, codes: Tensor) -> Tensor:
    return torch.empty_like(codes)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _turned_back(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    latent, codes = ctx.saved_tensors
    gradient = gradient.to(latent.dtype)
    length = latent.norm(dim=-1, keepdim=True)
    short = length < SHORTEST
    scale = (codes.norm(dim=-1, keepdim=True) / length).masked_fill_(short, 1)
    source, target, between = _directions(latent, codes)
    # The transposed rotation, in the memory of what it needs: fresh memory costs more than the arithmetic.
    along = 2 * (gradient * target).sum(-1, keepdim=True).masked_fill_(short, 0)
    across = -2 * (gradient * between).sum(-1, keepdim=True).masked_fill_(short, 0)
    return between.mul_(across).add_(source.mul_(along)).add_(gradient).mul_(scale), None


_rotation.register_autograd(_turned_back, setup_context=_keep)


def rotation_trick_plain(latent: Tensor, codes: Tensor) -> Tensor:
    """What `rotation_trick` computes, by definition: the formula, with all but x detached."""
    length = latent.detach().norm(dim=-1, keepdim=True)
    scale = codes.detach().norm(dim=-1, keepdim=True) / length.clamp(min=SHORTEST)
    source, target, between = _directions(latent.detach(), codes.detach())
    along = (latent * between).sum(-1, keepdim=True) * between
    onto = (latent * source).sum(-1, keepdim=True) * target
    turned = torch.where(length < SHORTEST, latent, scale * (latent - 2 * along + 2 * onto))
    return codes.detach() + gradient_of(turned, codes.dtype)


def _directions(latent: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of token, code, and their middle."""
    source = F.normalize(latent, dim=-1, eps=SHORTEST)
    target = F.normalize(codes, dim=-1, eps=SHORTEST)
    return source, target, F.normalize(source + target, dim=-1, eps=SHORTEST)


def diveq(latent: Tensor, codes: Tensor, variance: float) -> Tensor:
    """The token moved by its distance to the code, in a noisy direction (Vali et al. 2025, DiVeQ).

    x + |q - x| sg(n(q - x + noise)): the distance carries gradients to both token and code, so that no further loss
    is needed. With noise the value is near the code; where it must be the code, `variance` is 0.

    Args:
        latent: float `(..., D)`.
        codes: float `(..., D)`; receives gradients.
        variance: of the normal noise; 0 gives the value of the codes exactly.

    Returns:
        A tensor of the dtype of `codes`.
    """
    step = codes - latent
    noisy = step.detach()
    if variance > 0:
        noisy = noisy + variance**0.5 * torch.randn_like(noisy)
    # The root has no derivative at 0, where a token is its code.
    length = step.square().sum(-1, keepdim=True).clamp(min=SHORTEST**2).sqrt()
    moved = latent + length * F.normalize(noisy, dim=-1, eps=SHORTEST)
    return moved.to(codes.dtype) if variance > 0 else codes.detach() + gradient_of(moved, codes.dtype)


def scaled_gradient(tensor: Tensor, scale: float) -> Tensor:
    """`tensor` with its gradient multiplied by `scale`."""
    return tensor.detach() + scale * gradient_of(tensor, tensor.dtype)


def gradient_of(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros of the type `dtype`, with the gradient of `tensor`: what is added to the value that stands for it."""
    return (tensor - tensor.detach()).to(dtype)
