"""Our precision and recall of 10,000 x 10,000 x 2048 beside torch-fidelity's, and beside ADM's algorithm, in one run.

`extra_info` gets the seconds of everybody, the peers' over ours (`ratio_...`), and `megabytes`, by which ours made the
process larger.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch_fidelity.metric_prc import prc_features_to_metric

from smalti.eval.precision_recall import PrecisionRecall, precision_recall

COUNT, WIDTH = 10_000, 2048
SETS = f"""
import torch
torch.set_num_threads(2)
generator = torch.Generator().manual_seed(0)
samples, references = (
    scale * torch.randn({COUNT}, {WIDTH}, generator=generator).relu_() for scale in (0.30, 0.31)
)
"""
# In a process of its own, with the kernel's record of the largest size begun again (Linux).
MEMORY = """
from pathlib import Path
from smalti.eval.precision_recall import precision_recall
def size(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024
precision_recall(samples[:64], references[:64])
Path("/proc/self/clear_refs").write_text("5")
before = size("VmRSS")
precision_recall(samples, references)
print(size("VmHWM") - before)
"""


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


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


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = action()
    return time.perf_counter() - started, result


def test_precision_and_recall(benchmark: BenchmarkFixture) -> None:
    scope: dict[str, Any] = {}
    exec(SETS, scope)
    sets = scope["samples"], scope["references"]
    first, found = timed(lambda: precision_recall(*sets))
    of_adm, by_adm = timed(lambda: adm(*sets))
    of_fidelity, by_fidelity = timed(lambda: prc_features_to_metric(*sets, prc_neighborhood=3, verbose=False))
    last, _ = timed(lambda: precision_recall(*sets))
    ours = min(first, last)
    # cdist and addmm round differently: a vector on a border may fall either way.
    assert found == pytest.approx((by_fidelity["precision"], by_fidelity["recall"]), abs=2e-3)
    assert found == pytest.approx(by_adm, abs=2e-3)
    memory = subprocess.run([sys.executable, "-c", SETS + MEMORY], check=True, capture_output=True, text=True)
    megabytes = float(memory.stdout)
    assert megabytes < 300
    benchmark.extra_info |= {
        "seconds": ours,
        "seconds_torch_fidelity": of_fidelity,
        "seconds_adm": of_adm,
        "ratio_torch_fidelity": of_fidelity / ours,
        "ratio_adm": of_adm / ours,
        "megabytes": megabytes,
    }
    benchmark.pedantic(precision_recall, tuple(rows[:1000] for rows in sets), rounds=1)
