"""Maximum mean discrepancies of two sets of features: the kernel Inception distance and CMMD.

Legend: N samples, M references, D width of their features, k a kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.core.errors import UserError
from smalti.eval.feature_rows import check_sets
from smalti.eval.inception_score import Score

BLOCK = 1024
CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0
KERNEL_DEFINITION = (
    "kernel Inception distance, Binkowski et al. 2018: squared maximum mean discrepancy with (x.y / D + 1)^3, float64"
)
CMMD_DEFINITION = (
    "Jayasumana et al. 2024: squared maximum mean discrepancy with exp(-|x - y|^2 / (2 * 10^2)) of vectors of unit "
    "length, diagonals included, times 1000, float64"
)

Kernel = Callable[[Tensor, Tensor], Tensor]
"""Float64 `(R, D)` and `(C, D)` to `(R, C)`."""


def definition_of_subsets(subsets: int, size: int, seed: int) -> str:
    """The definition of `kernel_distance_of_subsets` in words, for protocols."""
    return f"{KERNEL_DEFINITION}; mean of unbiased estimates from {subsets} subsets of {size}, drawn with seed {seed}"


def kernel_distance(samples: Tensor, references: Tensor) -> float:
    """The unbiased estimate from all pairs, which has no chance in it; it can be slightly negative.

    Args:
        samples: `(N, D)`.
        references: `(M, D)`.

    Raises:
        UserError: other shapes, values that are not finite, or fewer than 2 vectors in a set.
    """
    check_sets(samples, references, at_least=2)
    return _unbiased(samples, references)


def kernel_distance_of_subsets(
    samples: Tensor, references: Tensor, subsets: int = 100, size: int = 1000, seed: int = 2020
) -> Score:
    """Mean and standard deviation over random subsets, as torch-fidelity draws them.

    The mean estimates what `kernel_distance` gives, with noise; it needs no more time for larger sets.

    Args:
        samples: `(N, D)`.
        references: `(M, D)`.
        subsets: how many.
        size: vectors of each set in a subset, drawn without replacement.
        seed: of NumPy's `RandomState`; draws depend on the order of the vectors.

    Raises:
        UserError: other shapes, values that are not finite, or fewer vectors than `size` in a set.
    """
    if subsets < 1 or size < 2:
        raise UserError(f"a kernel distance needs 1 subset of 2 vectors or more, got {subsets} of {size}")
    check_sets(samples, references, at_least=size)
    random = np.random.RandomState(seed)
    found = []
    for _ in range(subsets):
        drawn = [
            vectors[torch.from_numpy(random.choice(len(vectors), size, replace=False)).to(vectors.device)]
            for vectors in (samples, references)
        ]
        found.append(_unbiased(*drawn))
    return Score(float(np.mean(found)), float(np.std(found)))


def cmmd(samples: Tensor, references: Tensor) -> float:
    """CMMD, 0 for equal sets.

    Its authors' estimate, which leaves the pairs of a vector with itself in, and so has a bias of order 1 / N.

    Args:
        samples: `(N, D)` features of CLIP ViT-L/14 at 336 pixels, of any length.
        references: `(M, D)`.

    Raises:
        UserError: other shapes, values that are not finite, or no vectors in a set.
    """
    check_sets(samples, references, at_least=1)
    own, others = (_sum(vectors, vectors, _gaussian) / len(vectors) ** 2 for vectors in (samples, references))
    between = _sum(samples, references, _gaussian) / (len(samples) * len(references))
    return max(CMMD_SCALE * (own + others - 2 * between), 0.0)  # rounding can take equal sets just below


def _unbiased(samples: Tensor, references: Tensor) -> float:
    """Binkowski et al. 2018, eq. 4, without the pairs of a vector with itself."""
    own, others = (
        (_sum(vectors, vectors, _cubic) - _diagonal(vectors)) / (len(vectors) * (len(vectors) - 1))
        for vectors in (samples, references)
    )
    return own + others - 2 * _sum(samples, references, _cubic) / (len(samples) * len(references))


def _sum(a: Tensor, b: Tensor, kernel: Kernel) -> float:
    """The sum of `kernel` over all pairs."""
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for columns in b.split(BLOCK):
        wide = columns.double()
        for rows in a.split(BLOCK):
            total += kernel(rows.double(), wide).sum()
    return float(total)


def _cubic(a: Tensor, b: Tensor) -> Tensor:
    values = (a @ b.T).div_(a.shape[1]).add_(1)
    return values.square().mul_(values)


def _diagonal(a: Tensor) -> float:
    squared = torch.linalg.vector_norm(a, dim=1, dtype=torch.float64).square()
    return float((squared / a.shape[1] + 1).pow(3).sum())


def _gaussian(a: Tensor, b: Tensor) -> Tensor:
    cosine = F.normalize(a) @ F.normalize(b).T
    return cosine.sub_(1).div_(CMMD_SIGMA**2).exp_()  # |x - y|^2 = 2 - 2 x.y
