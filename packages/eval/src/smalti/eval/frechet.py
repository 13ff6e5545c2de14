"""The Frechet distance between two sets of features, from streamed means and covariances.

Legend: n feature vectors seen, B vectors of a batch, D their width. Everything is float64 on the CPU.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from smalti.core.errors import UserError

FRECHET_DEFINITION = (
    "|mean_a - mean_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), covariances with n - 1, float64 (Dowson and Landau 1982)"
)


class Gaussian(Protocol):
    """Anything that has a mean `(D,)` and a covariance `(D, D)` in float64."""

    @property
    def mean(self) -> Tensor:
        """`(D,)`."""

    @property
    def covariance(self) -> Tensor:
        """`(D, D)`, symmetric."""


class GaussianStatistics:
    """Mean and covariance of feature vectors that arrive in batches.

    The result does not depend on how the vectors were divided into batches, nor on their order, beyond the
    rounding of float64: batches are joined by the pairwise update of Chan, Golub and LeVeque 1983, which
    does not lose digits where the mean is large against the spread.

    Attributes:
        n: vectors seen.
    """

    def __init__(self) -> None:
        self.n = 0
        self._mean = torch.empty(0)
        self._scatter = torch.empty(0)

    def update(self, features: Tensor) -> None:
        """Take in features `(B, D)` of any float type and device.

        Raises:
            UserError: not `(B, D)`, another D than before, or values that are not finite.
        """
        if features.ndim != 2:
            raise UserError(f"features must be (B, D), got {tuple(features.shape)}")
        if not len(features):
            return
        values = features.detach().to("cpu", torch.float64)
        if not bool(values.isfinite().all()):
            row = int((~values.isfinite()).any(1).nonzero()[0])
            raise UserError(f"features must be finite, but vector {self.n + row} is not")
        mean = values.mean(0)
        centred = values - mean
        self._join(len(values), mean, centred.T @ centred)

    def merge(self, other: GaussianStatistics) -> None:
        """Take in what `other` has seen, as if this had seen it.

        Raises:
            UserError: its features are of another width.
        """
        if other.n:
            self._join(other.n, other._mean, other._scatter)

    def _join(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        if not self.n:
            self.n, self._mean, self._scatter = n, mean.clone(), scatter.clone()
            return
        if mean.shape != self._mean.shape:
            raise UserError(f"features of {len(mean)} values do not go with earlier ones of {len(self._mean)}")
        total = self.n + n
        shift = mean - self._mean
        self._scatter += scatter
        self._scatter.addr_(shift, shift, alpha=self.n * n / total)
        self._mean = self._mean + shift * (n / total)
        self.n = total

    @property
    def mean(self) -> Tensor:
        """The mean vector `(D,)`."""
        if not self.n:
            raise UserError("a mean needs at least one feature vector, got none")
        return self._mean.clone()

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance `(D, D)`, divided by n - 1."""
        if self.n < 2:
            raise UserError(f"a covariance needs at least 2 feature vectors, got {self.n}")
        return self._scatter / (self.n - 1)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The squared Frechet distance between two Gaussians (Dowson and Landau 1982), 0 for equal ones.

    The trace of the root of S_a S_b is the sum of the roots of the eigenvalues of the symmetric L^T S_b L,
    where S_a = L L^T (Cholesky). Where neither covariance is safely definite, as always when there are no
    more vectors than dimensions, it is the nuclear norm of S_a^(1/2) S_b^(1/2).

    Raises:
        UserError: the two have different widths, or fewer than 2 vectors each.
    """
    mean_a, mean_b, covariance_a, covariance_b = a.mean, b.mean, a.covariance, b.covariance
    if mean_a.shape != mean_b.shape:
        raise UserError(f"features of {len(mean_a)} and of {len(mean_b)} values cannot be compared")
    shift = (mean_a - mean_b).square().sum()
    root = _trace_of_root(covariance_a, covariance_b)
    distance = shift + covariance_a.trace() + covariance_b.trace() - 2 * root
    return max(float(distance), 0.0)  # rounding can take equal Gaussians just below


def _trace_of_root(a: Tensor, b: Tensor) -> Tensor:
    factor = _cholesky(a)
    if factor is None:
        a, b = b, a
        factor = _cholesky(a)
    if factor is None:
        nuclear_norm: Tensor = torch.linalg.svdvals(_root(a) @ _root(b)).sum()
        return nuclear_norm
    inner = factor.T @ b @ factor
    trace: Tensor = torch.linalg.eigvalsh((inner + inner.T) / 2).clamp(min=0).sqrt().sum()
    return trace


def _cholesky(matrix: Tensor) -> Tensor | None:
    """The lower factor, or None where the matrix is not definite by more than rounding."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        return None
    pivots = factor.diagonal().square()
    rounding = len(matrix) * torch.finfo(matrix.dtype).eps * matrix.diagonal().max()
    return factor if bool(pivots.min() > rounding) else None


def _root(matrix: Tensor) -> Tensor:
    """The symmetric root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root
