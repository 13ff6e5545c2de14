"""Clusters of vectors around codes, the same on every process although each holds only its own vectors.

Legend: N vectors of this process, K codes, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.core.distributed import all_gather_cat, all_reduce_sum, rank
from smalti.core.noise import mixed_seed
from smalti.quant.lookup import nearest_code


@torch.no_grad()
def cluster_sums(tokens: Tensor, vectors: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Sums `(K, D)` and counts `(K,)` of the vectors of each code, over all processes.

    Args:
        tokens: int64 `(N,)`, the code of each vector.
        vectors: float `(N, D)`.
        size: K.
    """
    # Sorted sums instead of scattered ones: atomic additions on a GPU come in another order in every run.
    counts = torch.bincount(tokens, minlength=size)
    ordered = vectors[torch.argsort(tokens, stable=True)]
    sums = torch.segment_reduce(ordered, "sum", lengths=counts, axis=0, unsafe=True)
    both = all_reduce_sum(torch.cat([sums, counts[:, None].to(sums.dtype)], dim=1))
    return both[:, :-1], both[:, -1]


@torch.no_grad()
def shared_sample(vectors: Tensor, count: int, seed: int) -> Tensor:
    """`count` random vectors `(count, D)` out of those of all processes, the same on each.

    Drawn without replacement where there are enough vectors. The draw depends on `seed` and the number of
    processes only, not on a global generator.

    Args:
        vectors: float `(N, D)`, N at least 1.
        count: how many.
        seed: equal on all processes.
    """
    # Equal shapes on every process, whatever its N, so that they can be gathered.
    candidates = all_gather_cat(vectors[_draw(len(vectors), count, mixed_seed(seed, rank())).to(vectors.device)])
    return candidates[_draw(len(candidates), count, mixed_seed(seed, "all")).to(vectors.device)]


def _draw(size: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if count <= size:
        return torch.randperm(size, generator=generator)[:count]
    return torch.randint(size, (count,), generator=generator)


@torch.no_grad()
def kmeans(vectors: Tensor, means: Tensor, iterations: int, *, cosine: bool) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm over the vectors of all processes.

    Args:
        vectors: float `(N, D)`; of unit length where `cosine`.
        means: float `(K, D)`, where to start.
        iterations: assignments followed by averaging, at least 1.
        cosine: scale means to unit length after averaging (spherical k-means).

    Returns:
        Means `(K, D)`, of which one without vectors stays where it was, and how many vectors each of them is the mean
        of, `(K,)`.
    """
    counts = means.new_zeros(len(means))
    for _ in range(iterations):
        sums, counts = cluster_sums(nearest_code(vectors, means), vectors, len(means))
        averages = F.normalize(sums, dim=1, eps=1e-12) if cosine else sums / counts.clamp(min=1)[:, None]
        means = torch.where(counts[:, None] > 0, averages, means)
    return means, counts
