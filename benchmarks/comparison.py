"""The fixture `compare` of every benchmark: ours and its peers by turns, and the rows of ratios that come out.

A pytest plugin, loaded by the conftest at the root. pytest-benchmark runs the turns and writes the rows to its JSON, as
`extra_info`; `ratios.py` makes the table of them. A row holds `time` and, where it was measured, `memory`: `ratio`, the
median over the turns of the peer's over ours; `noise`, the standard deviation of its logarithm; and `rounds`.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

Action = Callable[[], object]
# A shorter call is repeated until its turn takes so long, in seconds.
SHORTEST_TURN = 0.02
# Average load of the machine before anything is measured.
LOAD = os.getloadavg()[0]
# Whose versions are stored beside the ratios, where they are installed.
VERSIONS = (
    "torch",
    "torchvision",
    "numpy",
    "scipy",
    "numba",
    "pillow",
    "simplejpeg",
    "vector-quantize-pytorch",
    "torch-fidelity",
    "torchmetrics",
    "clean-fid",
)


@dataclass(frozen=True)
class Ours:
    """What of ours is measured: the work in a few words, a call of it, and what is asked of it.

    `amounts` is what one call gets done, by its unit, such as `{"images": 4}`. `bars` and `memory_bars` are the least
    ratio by peer; `megabytes` is the most that a call may take.
    """

    what: str
    action: Action
    amounts: Mapping[str, float] = field(default_factory=dict)
    bars: Mapping[str, float] = field(default_factory=dict)
    memory_bars: Mapping[str, float] = field(default_factory=dict)
    megabytes: float | None = None


class Comparison:
    """What the fixture gives: call it to measure, or `record` what a benchmark has measured in a way of its own."""

    def __init__(self, benchmark: BenchmarkFixture, threads: int, most_rounds: int | None, device: str) -> None:
        assert benchmark.group, "a module of benchmarks names its area: pytestmark = pytest.mark.benchmark(group=...)"
        self.benchmark, self.threads, self.most_rounds, self.device = benchmark, threads, most_rounds, device
        self.rows = benchmark.extra_info.setdefault("ratios", [])

    def __call__(
        self,
        ours: Sequence[Ours],
        peers: Mapping[str, Action],
        *,
        rounds: int = 5,
        peer_scale: float = 1.0,
        memory_rounds: int = 0,
    ) -> None:
        """Time all by turns, so that a busy machine disturbs them alike, and their memory where rounds are given.

        A peer that does only a part of the work, because the whole takes too long, has its figures multiplied by
        `peer_scale`. Everything should have been called once, so that nothing is compiled in the first turn.
        """
        actions = [one.action for one in ours] + list(peers.values())
        if self.benchmark.disabled:
            self.benchmark.pedantic(lambda: [action() for action in actions])
            return
        first = [self._seconds(action) for action in actions]
        calls = [max(1, math.ceil(SHORTEST_TURN / max(seconds, 1e-6))) for seconds in first]
        turns = [first] if max(calls) == 1 else []
        self.benchmark.pedantic(
            lambda: turns.append([self._seconds(*work) for work in zip(actions, calls, strict=True)]),
            rounds=self._rounds(rounds) - len(turns),
        )
        times = [*zip(*turns, strict=True)]
        peaks = [self._megabytes(action, self._rounds(memory_rounds)) for action in actions] if memory_rounds else []
        for index, one in enumerate(ours):
            for other, peer in enumerate(peers, len(ours)):
                self.record(
                    one,
                    peer,
                    (times[index], [peer_scale * seconds for seconds in times[other]]),
                    (peaks[index], [peer_scale * megabytes for megabytes in peaks[other]]) if peaks else None,
                )

    def record(
        self,
        one: Ours,
        peer: str,
        seconds: tuple[Sequence[float], Sequence[float]],
        megabytes: tuple[Sequence[float], Sequence[float]] | None = None,
    ) -> None:
        """Add the row of one peer: seconds of ours and of the peer by turns, and megabytes likewise."""
        own, others = map(statistics.median, seconds)
        row: dict[str, Any] = {
            "area": self.benchmark.group,
            "what": one.what,
            "device": self.device,
            "threads": self.threads,
            "peer": peer,
            "seconds": own,
            "peer_seconds": others,
            "time": _ratio(*seconds, one.bars.get(peer)),
        }
        if one.amounts:
            row["rates"] = {unit: amount / own for unit, amount in one.amounts.items()}
        if megabytes:
            row["megabytes"], row["peer_megabytes"] = map(statistics.median, megabytes)
            row["memory"] = _ratio(*megabytes, one.memory_bars.get(peer))
        if one.megabytes is not None:
            row["most_megabytes"] = one.megabytes
        self.rows.append(row)

    def _rounds(self, wanted: int) -> int:
        return min(wanted, self.most_rounds or wanted)

    def _seconds(self, action: Action, calls: int = 1) -> float:
        """Of one call; of the device between two events, of one thread by its CPU time, of several by the clock."""
        if self.device == "cuda":
            import torch

            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                action()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1000 / calls
        clock = time.process_time if self.threads == 1 else time.perf_counter
        before = clock()
        for _ in range(calls):
            action()
        return (clock() - before) / calls

    def _megabytes(self, action: Action, rounds: int) -> list[float]:
        """By how much each call raises what is allocated, of the device or of the process; at least 0.1."""
        action()  # what is allocated once and kept is no cost of a call
        peak = _device_peak if self.device == "cuda" else _resident_peak
        return [max(peak(action), 0.1) for _ in range(rounds)]


def _device_peak(action: Action) -> float:
    import torch

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    action()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def _resident_peak(action: Action) -> float:
    """Of the process, by the kernel's own record; Linux only."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _status("VmRSS")
    action()
    return (_status("VmHWM") - before) / 1000


def _ratio(own: Sequence[float], others: Sequence[float], bar: float | None) -> dict[str, Any]:
    ratios = [other / one for one, other in zip(own, others, strict=True)]
    found = {
        "ratio": statistics.median(ratios),
        "noise": statistics.stdev(map(math.log, ratios)),
        "rounds": len(ratios),
    }
    return found if bar is None else {**found, "bar": bar}


def _status(name: str) -> float:
    """Kilobytes (10^3)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1.024


@pytest.fixture
def threads() -> int:
    """Threads of torch; a folder or a test that wants others overrides this."""
    return 2


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: BenchmarkFixture, threads: int) -> Iterator[Comparison]:
    """The comparison of this benchmark, with so many threads; on the device for what is marked `gpu`."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    device = "cuda" if request.node.get_closest_marker("gpu") else "cpu"
    yield Comparison(benchmark, threads, request.config.getoption("--rounds"), device)
    torch.set_num_threads(before)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option for a quick look."""
    parser.addoption(
        "--rounds", type=_at_least_two, metavar="N", help="turns of a benchmark, at most (for a quick look)"
    )


def _at_least_two(text: str) -> int:
    return max(2, int(text))  # a single one has no spread


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the benchmarks of a GPU out where there is none."""
    left = [item for item in items if item.get_closest_marker("gpu") and "compare" in getattr(item, "fixturenames", ())]
    if left and not _cuda():
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in left]


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Tell in the JSON what the ratios depend on."""
    distributions = importlib.metadata.distributions()
    installed = {one.metadata["Name"].lower().replace("_", "-"): one.version for one in distributions}
    kilobytes = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    machine_info["smalti"] = {
        "cpu": machine_info["cpu"].get("brand_raw", "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "gigabytes": round(int(kilobytes.split()[1]) * 1024 / 1e9),
        "gpu": _cuda(),
        "versions": {"python": machine_info["python_version"]}
        | {name: installed[name] for name in VERSIONS if name in installed},
        "load": LOAD,
    }


def _cuda() -> str | None:
    """The name of the GPU."""
    import torch  # here, so that tests which need no torch are not slowed down

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
