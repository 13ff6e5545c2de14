"""Entropy regularisation: certain tokens, evenly used codes (Yu et al. 2023, "MAGVIT-v2", equation 5).

Every token has a distribution over the codes. The mean of the tokens' entropies is to be small (each token knows
its code) and the entropy of the mean distribution large (all codes are used). All entropies are in nats.

Legend: N tokens, D width, K codes, d bits (K = 2^d), G groups of g bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from smalti.core.distributed import all_reduce_sum, world_size
from smalti.core.errors import UserError

LogFloor = Literal["add", "clamp"]
"""How the logarithm of a vanishing probability p stays finite: log(p + eps), or log(max(p, eps)).

`add` is MAGVIT-v2's: for the mean distribution only, the tokens' own entropies are exact. `clamp` is that of
vector-quantize-pytorch, in both entropies.
"""

EPSILON = 1e-5
# Probabilities of one block of tokens; a few arrays of this size live at once.
BLOCK = 1 << 22


class Entropies(NamedTuple):
    """Scalars: `sample`, mean entropy of the tokens' distributions; `batch`, entropy of their mean."""

    sample: Tensor
    batch: Tensor

    def loss(self, sample_weight: float = 1.0, batch_weight: float = 1.0) -> Tensor:
        """What is minimised: sample_weight * sample - batch_weight * batch."""
        return sample_weight * self.sample - batch_weight * self.batch


def affinity_entropy(
    vectors: Tensor,
    affinities: Callable[[Tensor], Tensor],
    temperature: float = 0.01,
    *,
    floor: LogFloor = "add",
    block: int = BLOCK,
) -> Entropies:
    """Entropies of softmax(affinities / temperature), exact in value and gradient, a block of tokens at a time.

    The backward pass computes the affinities again, so that the N x K probabilities never exist at once. The mean
    distribution is that of the tokens of all processes; its gradient, averaged over processes as data parallel
    training does, is that of the whole batch.

    Args:
        vectors: float `(N, D)`, N at least 1.
        affinities: from some of the vectors `(n, D)` to affinities `(n, K)`, higher is closer: see
            `dot_affinities` and `distance_affinities`. What it closes over gets gradients as well.
        temperature: above 0.
        floor: see `LogFloor`; eps is 1e-5.
        block: elements of a block, about.
    """
    rows = max(1, block // affinities(vectors[:1].detach()).shape[1])
    sample, total = vectors.new_zeros(()), vectors.new_zeros(())

    def part(some: Tensor) -> tuple[Tensor, Tensor]:
        logs = F.log_softmax(affinities(some) / temperature, dim=1)
        shares = logs.exp()
        if floor == "clamp":
            logs = shares.clamp(min=EPSILON).log()
        return -(shares * logs).sum(), shares.sum(0)

    for start in range(0, len(vectors), rows):
        some = vectors[start : start + rows]
        if len(vectors) <= rows:
            entropy, shares = part(some)
        else:
            entropy, shares = checkpoint(part, some, use_reentrant=False, preserve_rng_state=False)
        sample, total = sample + entropy, total + shares
    return Entropies(sample / len(vectors), _entropy_of_mean(total / len(vectors), floor))


def dot_affinities(codebook: Tensor) -> Callable[[Tensor], Tensor]:
    """Affinities x.e to the codes `(K, D)`."""
    return lambda vectors: vectors @ codebook.t()


def distance_affinities(codebook: Tensor) -> Callable[[Tensor], Tensor]:
    """Minus the squared distances to the codes `(K, D)`, up to |x|^2, which a softmax does not see."""
    return lambda vectors: torch.addmm(-codebook.square().sum(1), vectors, codebook.t(), alpha=2)


def bits_entropy(logits: Tensor, *, group: int | None = None, floor: LogFloor = "add") -> Entropies:
    """Entropies over all 2^d strings of d independent bits, without a table of tokens by codes.

    A softmax of 2 x.c / T over the codes c in {-s, s}^d is a product of bits with the log-odds 4 s x / T. So the
    entropy of a token is the sum of those of its bits, and the mean distribution, as a table of 2^(g/2) by 2^(g/2),
    is a product of the distributions of the two halves of the bits: memory N 2^(g/2) + 2^g.

    Args:
        logits: float `(N, d)`, log-odds of every bit; N at least 1.
        group: g, a divisor of d. The mean distribution is then taken over the strings of every g bits, and the
            entropies of the d / g groups are added up, never less than the exact one. g = d (the default) is exact,
            g = 1 the form of XQ-GAN, between lies that of BSQ (Zhao et al. 2024).
        floor: see `LogFloor`; it concerns the mean distribution only, a token's entropy is exact.

    Raises:
        UserError: a group size that does not divide d.
    """
    bits = logits.shape[1]
    group = bits if group is None else group
    if group < 1 or bits % group:
        raise UserError(f"the entropy's group of {group} bits must divide the {bits} bits of a code")
    grouped = logits.unflatten(1, (bits // group, group))
    first, second = (bit_strings(part) for part in grouped.split([group // 2, group - group // 2], dim=2))
    mean = torch.einsum("nga,ngb->gab", first / len(logits), second)
    return Entropies(bit_entropies(logits).sum() / len(logits), _entropy_of_mean(mean, floor))


def bit_entropies(logits: Tensor) -> Tensor:
    """Entropy of every bit, from its log-odds; any shape."""
    # Of the size of the log-odds: both terms vanish together for a sure bit, where softplus(u) - u p would cancel.
    size = logits.abs()
    return F.softplus(-size) + size * torch.sigmoid(-size)


def bit_strings(logits: Tensor) -> Tensor:
    """Probabilities `(..., 2^g)` of all strings of g independent bits with log-odds `(..., g)`.

    Strings are in the order of the numbers they make with the first bit as the least significant one.
    """
    ones, zeros = torch.sigmoid(logits), torch.sigmoid(-logits)
    strings = logits.new_ones(*logits.shape[:-1], 1)
    for bit in range(logits.shape[-1]):
        strings = torch.cat([strings * zeros[..., bit, None], strings * ones[..., bit, None]], dim=-1)
    return strings


def _entropy_of_mean(mean: Tensor, floor: LogFloor) -> Tensor:
    if world_size() > 1:
        everywhere = all_reduce_sum(mean.detach().clone()) / world_size()
        mean = mean + (everywhere - mean.detach())
    logs = (mean + EPSILON if floor == "add" else mean.clamp(min=EPSILON)).log()
    return -(mean * logs).sum()


def affinity_entropy_plain(affinities: Tensor, temperature: float = 0.01, *, floor: LogFloor = "add") -> Entropies:
    """What `affinity_entropy` computes, by definition, from the whole matrix of affinities `(N, K)`."""
    shares = torch.softmax(affinities / temperature, dim=1)
    logs = torch.log_softmax(affinities / temperature, dim=1) if floor == "add" else shares.clamp(min=EPSILON).log()
    return Entropies(-(shares * logs).sum(1).mean(), _entropy_of_mean(shares.mean(0), floor))


def bits_entropy_plain(logits: Tensor, *, floor: LogFloor = "add") -> Entropies:
    """What `bits_entropy` computes with a single group, by definition: a softmax over the table of all 2^d codes."""
    bits = logits.shape[1]
    strings = (torch.arange(2**bits, device=logits.device)[:, None] >> torch.arange(bits, device=logits.device)) & 1
    shares = torch.softmax(logits @ strings.to(logits.dtype).t(), dim=1)
    logs = torch.log_softmax(logits @ strings.to(logits.dtype).t(), dim=1)
    return Entropies(-(shares * logs).sum(1).mean(), _entropy_of_mean(shares.mean(0), floor))
