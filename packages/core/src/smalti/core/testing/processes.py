"""Running a function in two processes that form a gloo group, as the distributed parts of the contracts need."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from smalti.core.files import atomic_write


def run_in_processes(function: Callable[..., Any], *arguments: Any, processes: int = 2) -> list[Any]:
    """Call `function(rank, *arguments)` in every process of a group; what they return, in the order of ranks.

    `function` must be importable (a module-level function), arguments and results must be picklable.
    """
    with tempfile.TemporaryDirectory() as folder:
        spawn(_process, (function, arguments, processes, folder), nprocs=processes)
        return [
            torch.load(_result(folder, rank), weights_only=False)  # our own, of this very call
            for rank in range(processes)
        ]


def _process(rank: int, function: Callable[..., Any], arguments: tuple[Any, ...], processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    # Accelerate asks the environment, as `torchrun` sets it, and not the process group.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    with atomic_write(_result(folder, rank)) as file:
        torch.save(function(rank, *arguments), file)
    # The group is not taken down: gloo's threads now and then abort a process that is about to end well. All must
    # be through, though, before one goes.
    while not all(_result(folder, other).exists() for other in range(processes)):
        time.sleep(0.01)
    os._exit(0)


def _result(folder: str, rank: int) -> Path:
    return Path(folder) / f"result-{rank}.pt"
