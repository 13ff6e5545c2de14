"""Our precision and recall of 10,000 x 10,000 x 2048 beside torch-fidelity's and beside ADM's algorithm."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from comparison import Comparison, Ours
from torch import Tensor
from torch_fidelity.metric_prc import prc_features_to_metric

from smalti.eval.precision_recall import PrecisionRecall, precision_recall

pytestmark = pytest.mark.benchmark(group="Precision and recall")
COUNT, WIDTH = 10_000, 2048
BARS = {"torch-fidelity": 4.0, "ADM": 2.0}


def adm(samples: Tensor, references: Tensor, neighbours: int = 3) -> PrecisionRecall:
    """ADM's way, written plainly: whole blocks of distances, in float32, and a partition of every row."""

    def distances(a: Tensor, b: Tensor) -> Tensor:
        found = a.square().sum(1)[:, None] - 2 * (a @ b.T) + b.square().sum(1)
        return found.clamp_(min=0)

    def radii(vectors: Tensor) -> Tensor:
        found = distances(vectors, vectors).numpy()
        return torch.from_numpy(np.partition(found, range(neighbours + 1), axis=1)[:, neighbours].copy())

    own, others = radii(samples), radii(references)
    between = distances(samples, references)
    precise = (between <= others).any(1).double().mean()
    return PrecisionRecall(float(precise), float((between <= own[:, None]).any(0).double().mean()))


def test_precision_and_recall(compare: Comparison) -> None:
    generator = torch.Generator().manual_seed(0)
    samples, references = (scale * torch.randn(COUNT, WIDTH, generator=generator).relu_() for scale in (0.30, 0.31))

    def ours() -> PrecisionRecall:
        return precision_recall(samples, references)

    def by_fidelity() -> dict[str, float]:
        found: dict[str, float] = prc_features_to_metric(samples, references, prc_neighborhood=3, verbose=False)
        return found

    def by_adm() -> PrecisionRecall:
        return adm(samples, references)

    found, theirs = ours(), by_fidelity()
    # cdist and addmm round differently: a vector on a border may fall either way.
    assert found == pytest.approx((theirs["precision"], theirs["recall"]), abs=2e-3)
    assert found == pytest.approx(by_adm(), abs=2e-3)
    work = Ours(f"{COUNT:,} x {COUNT:,} x {WIDTH}", ours, bars=BARS, megabytes=300)
    compare([work], {"torch-fidelity": by_fidelity, "ADM": by_adm}, rounds=3, memory_rounds=2)
