"""Softmax over codes, a block of vectors at a time: drawing codes, and gradients through all of them.

The backward pass computes the affinities of a block again, so that the N x K matrix never exists.

Legend: N vectors, K codes, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Affinities of one block of vectors; a few arrays of this size live at once.
BLOCK = 1 << 22

Affinities = Callable[[Tensor], Tensor]
"""From vectors `(n, D)` to affinities `(n, K)`, higher is closer; see `smalti.quant.entropy`."""


@torch.no_grad()
def best_code(
    vectors: Tensor, affinities: Affinities, size: int, *, temperature: float = 1.0, noise_seed: Tensor | None = None
) -> Tensor:
    """The index `(N,)` of the code with the largest affinity; of equal ones the first.

    Args:
        vectors: float `(N, D)`; N may be 0.
        affinities: see `Affinities`.
        size: K.
        temperature: above 0; matters with noise only.
        noise_seed: int64 `()`; Gumbel noise by this seed makes the index a draw from softmax(affinities / temperature).
    """
    nearest = vectors.new_empty(len(vectors), dtype=torch.int64)
    for start, some in _blocks(vectors, size):
        nearest[start : start + len(some)] = _logits(some, affinities, temperature, noise_seed, start).argmax(1)
    return nearest


def expected_code(
    vectors: Tensor,
    codebook: Tensor,
    affinities: Affinities,
    *,
    temperature: float = 1.0,
    noise_seed: Tensor | None = None,
    relaxation: float | Tensor = 1.0,
) -> Tensor:
    """The mean of the codes under softmax(affinities / temperature), `(N, D)`, differentiable in the affinities.

    Args:
        vectors: float `(N, D)`.
        codebook: float `(K, D)`, what is averaged; receives no gradient.
        affinities: see `Affinities`; what it closes over gets gradients.
        temperature: above 0.
        noise_seed: as in `best_code`; the same seed gives the same noise (Gumbel-softmax, Jang et al. 2017).
        relaxation: temperature of the softmax over affinities and noise, which does not change what is drawn.
    """

    def mean(some: Tensor, start: int) -> Tensor:
        logits = _logits(some, affinities, temperature, noise_seed, start)
        return (logits / relaxation).softmax(1) @ codebook.detach()

    parts = [
        mean(some, start)
        if len(some) == len(vectors)
        else checkpoint(mean, some, start, use_reentrant=False, preserve_rng_state=False)
        for start, some in _blocks(vectors, len(codebook))
    ]
    return torch.cat(parts)


def _blocks(vectors: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    rows = max(1, BLOCK // size)
    for start in range(0, len(vectors), rows):
        yield start, vectors[start : start + rows]


def _logits(
    vectors: Tensor, affinities: Affinities, temperature: float, noise_seed: Tensor | None, start: int
) -> Tensor:
    logits = affinities(vectors) / temperature
    if noise_seed is None:
        return logits
    noise: Tensor = _gumbel_noise(logits.detach(), noise_seed, start)
    return logits + noise


# An operator, since a generator needs the value of its seed: torch.compile then keeps one graph.
@torch.library.custom_op("smalti::gumbel_noise", mutates_args=())
def _gumbel_noise(like: Tensor, seed: Tensor, start: int) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(int(seed) + start)
    noise = torch.empty_like(like).exponential_(generator=generator)
    return noise.clamp_(min=torch.finfo(noise.dtype).tiny).log_().neg_()


@_gumbel_noise.register_fake
def _(like: Tensor, seed: Tensor, start: int) -> Tensor:
    return torch.empty_like(like)
