"""Our Frechet distance of 2048-d statistics beside its peers, on the same statistics in the same run.

For ill-conditioned covariances it is the error that must be the least.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import cleanfid.fid
import numpy as np
import pytest
import torch
from comparison import Comparison, Ours
from torch import Tensor
from torch_fidelity.metric_fid import fid_statistics_to_metric
from torchmetrics.image import fid as torchmetrics_fid

from smalti.eval.frechet import Gaussian, GaussianStatistics, frechet_distance

# clean-fid calls SciPy in a way that SciPy will no longer take.
pytestmark = [
    pytest.mark.benchmark(group="Frechet distance"),
    pytest.mark.filterwarnings("ignore:The `disp` argument is deprecated:DeprecationWarning"),
]

WIDTH = 2048


class Given(NamedTuple):
    """Statistics with a known distance."""

    mean: Tensor
    covariance: Tensor


def statistics(seed: int) -> GaussianStatistics:
    """Of as many vectors as make a covariance definite, correlated as features are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    found = GaussianStatistics()
    for _ in range(4):
        found.update(torch.randn(WIDTH, WIDTH, generator=generator) @ mixing)
    return found


def by_sqrtm(a: Gaussian, b: Gaussian) -> float:
    """`scipy.linalg.sqrtm` of the product, by clean-fid's routine."""
    return float(cleanfid.fid.frechet_distance(*(one.numpy() for s in (a, b) for one in (s.mean, s.covariance))))


def by_torch_fidelity(a: Gaussian, b: Gaussian) -> float:
    """Eigenvalues of the product."""
    both = [{"mu": s.mean.numpy(), "sigma": s.covariance.numpy()} for s in (a, b)]
    return float(fid_statistics_to_metric(*both, verbose=False)["frechet_inception_distance"])


def by_torchmetrics(a: Gaussian, b: Gaussian) -> float:
    """The same in PyTorch."""
    return float(torchmetrics_fid._compute_fid(a.mean, a.covariance, b.mean, b.covariance))


def test_frechet_distance(compare: Comparison) -> None:
    a, b = statistics(0), statistics(1)
    a.mean, b.mean  # noqa: B018  (joins what waits)
    peers = {"sqrtm": by_sqrtm, "torch-fidelity": by_torch_fidelity, "torchmetrics": by_torchmetrics}
    found = frechet_distance(a, b)
    for other in peers.values():
        assert found == pytest.approx(other(a, b), rel=1e-6)
    bars = {"sqrtm": 10.0, "torch-fidelity": 2.5}
    work = Ours(f"distance of {WIDTH}-d statistics", lambda: frechet_distance(a, b), bars=bars)
    compare([work], {name: partial(other, a, b) for name, other in peers.items()}, rounds=3)


@pytest.mark.parametrize("kind", ["14 decades", "quarter rank"])
def test_error_on_ill_conditioned_covariances(kind: str) -> None:
    width = 512
    basis = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0]
    spectrum = torch.logspace(0, -14, width, dtype=torch.float64)
    if kind == "quarter rank":
        spectrum = (torch.arange(width) < width // 4).double()
    covariance = basis * spectrum @ basis.T
    covariance = (covariance + covariance.T) / 2
    a, b = (Given(torch.zeros(width, dtype=torch.float64), factor * covariance) for factor in (1, 4))
    expected = float(spectrum.sum())  # (2 - 1)^2 of every root
    errors = {
        name: abs(by(a, b) - expected)
        for name, by in (
            ("ours", frechet_distance),
            ("sqrtm", by_sqrtm),
            ("torch_fidelity", by_torch_fidelity),
            ("torchmetrics", by_torchmetrics),
        )
    }
    assert errors["ours"] < min(error for name, error in errors.items() if name != "ours")


@pytest.mark.parametrize("batch", [64, 500])
def test_statistics_of_a_stream(compare: Comparison, batch: int) -> None:
    """Mean and covariance of batches beside torchmetrics' sums, which are updated for every batch."""
    batches = list(torch.randn(6400, WIDTH).split(batch))

    def ours() -> float:
        found = GaussianStatistics()
        for rows in batches:
            found.update(rows)
        return float(found.covariance.trace())

    def theirs() -> float:
        total, products = torch.zeros(WIDTH).double(), torch.zeros(WIDTH, WIDTH).double()
        for rows in batches:
            values = rows.double()
            total += values.sum(0)
            products += values.T @ values
        count = 6400
        return float((products - total[:, None] @ total[None] / count).trace() / (count - 1))

    assert ours() == pytest.approx(theirs(), rel=1e-9)
    work = Ours(f"statistics of a stream in batches of {batch}", ours, amounts={"vectors": 6400})
    compare([work], {"torchmetrics' sums": theirs}, rounds=3)


def test_kernel_distance_agrees() -> None:
    """KID over everything once: what clean-fid and torchmetrics give for the only subset there is."""
    from torchmetrics.image.kid import poly_mmd

    from smalti.eval.kernel_distance import kernel_distance

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(400, 64, generator=generator, dtype=torch.float64) + shift for shift in (0, 0.2))
    found = kernel_distance(a, b)
    np.random.seed(0)  # clean-fid draws from here; a permutation makes no difference
    theirs = cleanfid.fid.kernel_distance(a.numpy(), b.numpy(), num_subsets=1)
    assert found == pytest.approx(theirs, rel=1e-9)
    assert found == pytest.approx(float(poly_mmd(b, a)), rel=1e-9)
