"""The straight-through estimator."""

from __future__ import annotations

from torch import Tensor


def straight_through(latent: Tensor, codes: Tensor) -> Tensor:
    """The value of `codes` with the gradient of the identity on `latent` (Bengio et al. 2013; VQ-VAE, section 3.1).

    Args:
        latent: what was quantized, any shape.
        codes: what it was quantized to, the same shape; receives no gradient.

    Returns:
        A tensor of the dtype of `codes`, equal to it exactly. (The usual form, latent + sg(codes - latent),
        is off by a rounding error, and decoding the tokens would not give the same bits.) Where the latent
        is not finite, the result is NaN.
    """
    return codes.detach() + (latent - latent.detach()).to(codes.dtype)
