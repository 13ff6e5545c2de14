"""The Frechet distance between two sets of features, from streamed means and covariances.

Legend: n feature vectors seen, B vectors of a batch, D their width. Everything is float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, Self

import torch
from scipy.linalg import lapack
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.frechet import frechet_distance_of_rows as distance_of_rows
from smalti.eval.feature_rows import check_features, check_sets, is_finite

BLOCK = 1024
# Relative to the traces: what rounding may add before the slower way is taken.
PRECISION = 1e-9

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
    rounding of float64: blocks are joined by the pairwise update of Chan, Golub and LeVeque 1983, which
    does not lose digits where the mean is large against the spread.

    Attributes:
        n: vectors seen.
    """

    def __init__(self) -> None:
        self.n = 0
        self._device: str | torch.device = "cpu"
        self._mean = torch.empty(0, dtype=torch.float64)
        self._scatter = torch.empty(0, dtype=torch.float64)
        # Small batches wait here: a product of D x D values for a single vector would take most of the time.
        self._waiting: list[Tensor] = []
        self._joined = 0

    def update(self, features: Tensor, indices: Tensor | None = None) -> None:
        """Take in features `(B, D)` of any float type and device.

        Args:
            features: one vector for each image.
            indices: makes no difference, as the order makes none.

        Raises:
            UserError: not float `(B, D)`, another D than before, or values that are not finite.
        """
        check_features(features, self.n)
        if not len(features):
            return
        if self.n:
            self._check_width(features.shape[1])
        for block in features.detach().split(BLOCK):
            self._waiting.append(block.to(self._device, torch.float64, copy=True))
            self.n += len(block)
            if self.n - self._joined >= BLOCK:
                self._join_waiting()

    def merge(self, other: GaussianStatistics) -> None:
        """Take in what `other` has seen, as if this had seen it.

        Raises:
            UserError: its features are of another width.
        """
        if not other.n:
            return
        other._join_waiting()
        if self.n:
            self._check_width(len(other._mean))
            self._join_waiting()
        self.n += other.n
        self._join(other.n, other._mean.to(self._device), other._scatter.to(self._device))

    def _check_width(self, width: int) -> None:
        own = len(self._mean) if self._joined else self._waiting[0].shape[1]
        if width != own:
            raise UserError(f"features of {width} values do not go with earlier ones of {own}")

    def _join_waiting(self) -> None:
        if self._waiting:
            values = torch.cat(self._waiting)
            self._waiting = []
            mean = values.mean(0)
            centred = values - mean
            self._join(len(values), mean, centred.T @ centred)

    def _join(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        if not self._joined:
            self._joined, self._mean, self._scatter = n, mean.clone(), scatter.clone()
            return
        total = self._joined + n
        shift = mean - self._mean
        self._scatter += scatter
        self._scatter.addr_(shift, shift, alpha=self._joined * n / total)
        self._mean = self._mean + shift * (n / total)
        self._joined = total

    @property
    def mean(self) -> Tensor:
        """The mean vector `(D,)`."""
        if not self.n:
            raise UserError("a mean needs at least one feature vector, got none")
        self._join_waiting()
        return self._mean.clone()

    @property
    def covariance(self) -> Tensor:
        """The unbiased covariance `(D, D)`, divided by n - 1."""
        if self.n < 2:
            raise UserError(f"a covariance needs at least 2 feature vectors, got {self.n}")
        self._join_waiting()
        return self._scatter / (self.n - 1)

    def state_dict(self) -> dict[str, Tensor]:
        """What it has seen: `n`, float64 `mean` `(D,)` and `scatter` `(D, D)`, the covariance times n - 1."""
        self._join_waiting()
        return {"n": torch.tensor(self.n), "mean": self._mean, "scatter": self._scatter}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        self.n = self._joined = int(state["n"])
        # Copies: joining adds to the scatter in place.
        self._mean = state["mean"].to(self._device, torch.float64, copy=True)
        self._scatter = state["scatter"].to(self._device, torch.float64, copy=True)
        self._waiting = []

    def to(self, device: str | torch.device) -> Self:
        """Gather on `device`, which must have float64, from now on."""
        self._join_waiting()
        self._device = device
        self._mean, self._scatter = self._mean.to(device), self._scatter.to(device)
        return self


def statistics_of(features: Tensor) -> GaussianStatistics:
    """Mean and covariance of features `(N, D)` that are all there; errors as `GaussianStatistics.update`."""
    statistics = GaussianStatistics()
    statistics.update(features)
    return statistics


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """The squared Frechet distance between two Gaussians (Dowson and Landau 1982), 0 for equal ones.

    The trace of the root of S_a S_b is the sum of the roots of the eigenvalues of the symmetric L^T S_b L,
    where S_a = L L^T (Cholesky). Where these eigenvalues are too small for their roots to be exact, or where there
    is no such factor, as always when there are no more vectors than dimensions, it is the sum of the singular values
    of F_a^T F_b, where S = F F^T: slower, but exact for singular covariances, too.

    Raises:
        UserError: the two have different widths, fewer than 2 vectors each, or values that are not finite.
    """
    mean_a, covariance_a = a.mean, a.covariance
    mean_b, covariance_b = b.mean.to(mean_a.device), b.covariance.to(mean_a.device)
    if mean_a.shape != mean_b.shape:
        raise UserError(f"features of {len(mean_a)} and of {len(mean_b)} values cannot be compared")
    for values in (mean_a, mean_b, covariance_a, covariance_b):
        if not is_finite(values):
            raise UserError("the statistics of features must be finite, but a mean or covariance is not")
    shift = (mean_a - mean_b).square().sum()
    traces = covariance_a.trace() + covariance_b.trace()
    root = _trace_of_root(covariance_a, covariance_b, tolerance=float(traces) * PRECISION)
    return max(float(shift + traces - 2 * root), 0.0)  # rounding can take equal Gaussians just below


def frechet_distance_of_rows(a: Tensor, b: Tensor) -> float:
    """The same for the features `(N, D)` and `(M, D)` themselves, quick for some hundred vectors of any width.

    Raises:
        UserError: features that are not finite, of two widths, or fewer than 2.
    """
    check_sets(a, b, at_least=2)
    return distance_of_rows(a, b)


def _trace_of_root(a: Tensor, b: Tensor, tolerance: float) -> Tensor:
    factor = _cholesky(a)
    if factor is None:
        a, b = b, a
        factor = _cholesky(a)
    if factor is not None:
        values = _inner_eigenvalues(factor, b)
        rounding = torch.finfo(values.dtype).eps * values[-1]
        # The root of a value is as far off as the value is, divided by twice the root.
        if float((rounding / 2 / values.clamp(min=float(rounding)).sqrt()).sum()) <= tolerance:
            trace: Tensor = values.clamp(min=0).sqrt().sum()
            return trace
    else:
        factor = _root(a)
    other = _cholesky(b)
    singular: Tensor = torch.linalg.svdvals(factor.T @ (_root(b) if other is None else other))
    return singular.sum()


def _inner_eigenvalues(factor: Tensor, matrix: Tensor) -> Tensor:
    """The eigenvalues of L^T S L in ascending order."""
    if matrix.device.type != "cpu":
        inner = factor.T @ matrix @ factor
        of_inner: Tensor = torch.linalg.eigvalsh((inner + inner.T) / 2)
        return of_inner
    # LAPACK computes one half of the symmetric product. It reads by columns, and so the transposes; L^T is an upper
    # triangle.
    product, failed = lapack.dsygst(matrix.numpy().T, factor.numpy().T, itype=2, lower=0)
    assert not failed
    values: Tensor = torch.linalg.eigvalsh(torch.from_numpy(product).T, UPLO="L")
    return values


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
    # What rounding left of an eigenvalue of 0 has a root that is not small.
    rounding = len(matrix) ** 0.5 * torch.finfo(matrix.dtype).eps * values[-1]
    root: Tensor = (vectors * torch.where(values > rounding, values, 0).sqrt()) @ vectors.T
    return root
