"""The Frechet distance between two sets of features, from the features themselves.

Legend: N M vectors of the sets, D their width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smalti.core.errors import UserError


def frechet_distance_of_rows(a: Tensor, b: Tensor) -> float:
    """The squared distance of Gaussians fitted to features `(N, D)` and `(M, D)` (Dowson and Landau 1982), 0 or more.

    With centred features X and Y the trace of the root of the product of both covariances is the sum of the singular
    values of X Y^T / sqrt((N - 1) (M - 1)): no matrix here is larger than the smaller one of N and D. All is float64.

    Raises:
        UserError: fewer than two vectors in a set.
    """
    if min(len(a), len(b)) < 2:
        raise UserError(f"a Frechet distance needs at least 2 images, got {min(len(a), len(b))}")
    a, b = a.double(), b.double()
    shift = (a.mean(0) - b.mean(0)).square().sum()
    a, b = ((features - features.mean(0)) / (len(features) - 1) ** 0.5 for features in (a, b))
    variances = a.square().sum() + b.square().sum()
    # The triangular factors have the same products of few rows.
    a, b = (torch.linalg.qr(rows, mode="r").R if len(rows) > rows.shape[1] else rows for rows in (a, b))
    root = torch.linalg.svdvals(a @ b.T).sum()
    return max(float(shift + variances - 2 * root), 0.0)  # rounding can take equal sets just below
