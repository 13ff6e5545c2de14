"""From logits to tokens: guidance, temperature, top-k, top-p, and one draw by inverse CDF.

No function changes its input. What is filtered out becomes -inf.

Legend: B batch, K codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smalti.core.noise import uniform
from smalti.core.sampling_settings import SamplingSettings


def next_tokens(logits: Tensor, settings: SamplingSettings, indices: Tensor, step: int) -> Tensor:
    """Draw one token per sample.

    Args:
        logits: `(B, K)`, guided.
        settings: temperature, top-k, top-p and seed; guidance is not applied here.
        indices: `(B,)`, the numbers of the samples within the run.
        step: of decoding; with seed and index it determines the noise.

    Returns:
        `(B,)` int64.
    """
    if settings.temperature == 0:
        return logits.argmax(-1)
    logits = at_temperature(logits, settings.temperature)
    if settings.top_k:
        logits = top_k(logits, settings.top_k)
    if settings.top_p < 1:
        logits = top_p(logits, settings.top_p, among=settings.top_k)
    return inverse_cdf(logits, uniform(settings.seed, indices, step))


def guided(logits: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022) in LlamaGen's form: null + scale (conditional - null).

    Args:
        logits: `(2B, K)`, first all conditional ones, then those of the null class.
        scale: 1 gives the conditional ones.

    Returns:
        `(B, K)`.
    """
    conditional, null = logits.chunk(2)
    return null + (conditional - null) * scale


def at_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Logits `(B, K)` divided by a positive temperature.

    The largest logit of each row is moved to 0 first: no probability changes, and no temperature overflows.
    """
    return (logits - logits.amax(-1, keepdim=True)) / temperature


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest of each row of `(B, K)`, and all that equal the k-th."""
    if k >= logits.shape[-1]:
        return logits
    smallest_kept = logits.topk(k).values[:, -1:]
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def top_p(logits: Tensor, p: float, among: int = 0) -> Tensor:
    """Nucleus filter (Holtzman et al. 2020): keep a code if those more likely than it sum to at most p.

    So the first code beyond p is kept, the most likely one always, and codes of equal logits share their fate.

    Args:
        logits: `(B, K)`.
        p: between 0 and 1.
        among: where a top-k filter came before, its k: only so many are sorted. 0 for all.

    Returns:
        `(B, K)`.
    """
    size = logits.shape[-1]
    largest = logits.topk(min(among, size) or size).values
    # The total runs over all codes, since ties may have survived beyond the k-th.
    log_probabilities = largest - logits.logsumexp(-1, keepdim=True)
    probabilities = log_probabilities.exp().double()
    more_likely = probabilities.cumsum(-1) - probabilities
    kept = (more_likely <= p).sum(-1, keepdim=True)
    return logits.masked_fill(logits < largest.gather(-1, kept - 1), -torch.inf)


def inverse_cdf(logits: Tensor, uniform: Tensor) -> Tensor:
    """The first code whose cumulative probability, summed in float64, exceeds the uniform number of its row.

    Args:
        logits: `(B, K)`.
        uniform: `(B, 1)` float64 in [0, 1).

    Returns:
        `(B,)` int64; never a code of probability 0.
    """
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # The product may round up to the total, beyond the last code that has any probability.
    target = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)
