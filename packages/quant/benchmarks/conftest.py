"""What all benchmarks share: peers in turn with ours, and the memory of one call."""

from __future__ import annotations

import ctypes
import importlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

Action = Callable[[], object]
Compare = Callable[..., None]


@pytest.fixture
def library() -> Any:
    """vector-quantize-pytorch, of the dependency group `benchmark`; imported here, so that all can be collected."""
    return importlib.import_module("vector_quantize_pytorch")


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def compare(benchmark: BenchmarkFixture, threads: int) -> Compare:
    """Times ours and the peers in turn, so that a busy machine disturbs all alike; the least time of each counts.

    One thread is timed by the CPU time of the process, which other processes disturb little; two by the clock.
    `extra_info` gets `ratio_NAME`, the peer's time over ours; `peak_mb` and `peak_mb_NAME`, by how much one call
    raised the resident size of the process; and their ratio, `memory_ratio_NAME`.
    """

    def run(ours: Action, peers: Mapping[str, Action], rounds: int = 5) -> None:
        clock = time.process_time if threads == 1 else time.perf_counter
        info = benchmark.extra_info
        info["threads"], info["clock"] = threads, clock.__name__
        info["peak_mb"] = own_peak = min(_peak(ours) for _ in range(3))
        for name, peer in peers.items():
            info[f"peak_mb_{name}"] = peak = min(_peak(peer) for _ in range(3))
            info[f"memory_ratio_{name}"] = peak / own_peak
        taken = [[_seconds(action, clock) for action in (ours, *peers.values())] for _ in range(rounds)]
        info["seconds"], *others = map(min, zip(*taken, strict=True))
        for name, seconds in zip(peers, others, strict=True):
            info[f"ratio_{name}"] = seconds / info["seconds"]
        benchmark.pedantic(ours, rounds=rounds)

    return run


def _seconds(action: Action, clock: Callable[[], float]) -> float:
    start = clock()
    action()
    return clock() - start


def _peak(action: Action) -> float:
    """Growth of the resident size at its highest during a call, in megabytes (10^6), at least 0.1; Linux only."""
    action()  # what is allocated once and kept is no cost of a call
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _status("VmRSS")
    action()
    return max(_status("VmHWM") - before, 100) / 1000


def _status(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024 // 1000
