"""What every quantizer asks of its inputs: shape, type and range, and arithmetic in float32.

Legend: B batch, L token positions, S streams, D latent width, K codes of a stream.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from smalti.core.contracts import check_tokens as check_tokens
from smalti.core.errors import UserError


def full_precision(tensor: Tensor) -> torch.autocast:
    """A context in which autocast does not touch arithmetic on the device of `tensor`."""
    return torch.autocast(tensor.device.type, enabled=False)


def float32_or_wider(tensor: Tensor) -> Tensor:
    """`tensor` in float32; float64 stays what it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_latent(latent: Tensor, dim: int, *, training: bool) -> None:
    """Raise a `UserError` unless `latent` is a float `(B, *space, dim)`, with at least one token in training."""
    if latent.ndim not in (3, 4) or latent.shape[-1] != dim or not latent.is_floating_point():
        raise UserError(
            f"the latent must be float (B, L, {dim}) or (B, h, w, {dim}), got {latent.dtype} {tuple(latent.shape)}"
        )
    if training and latent.numel() == 0:
        raise UserError(f"a training batch needs at least one token, got a latent of {tuple(latent.shape)}")


@contextmanager
def checked_latent(latent: Tensor, dim: int, *, training: bool) -> Iterator[Tensor]:
    """A context with the latent in float32, or wider, in which autocast touches nothing.

    Raises:
        UserError: what `check_latent` says.
    """
    check_latent(latent, dim, training=training)
    with full_precision(latent):
        yield float32_or_wider(latent)


def as_tokens(indices: Tensor, latent: Tensor, streams: int = 1) -> Tensor:
    """The indices of all positions of a latent `(B, *space, D)`, one after the other, as tokens `(B, L, S)`."""
    return indices.view(len(latent), math.prod(latent.shape[1:-1]), streams)


def check_token_space(tokens: Tensor, space: tuple[int, ...], vocab: tuple[int, ...]) -> None:
    """`check_tokens`, and a `UserError` unless the L positions fill `space`."""
    check_tokens(tokens, vocab)
    if tokens.shape[1] != math.prod(space):
        raise UserError(
            f"tokens of a latent space {tuple(space)} have {math.prod(space)} positions, got {tokens.shape[1]}"
        )
