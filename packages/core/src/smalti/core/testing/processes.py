"""Running a function in two processes that form a gloo group, as the distributed parts of the contracts need."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn


def run_in_processes(function: Callable[..., Any], *arguments: Any, processes: int = 2) -> list[Any]:
    """Call `function(rank, *arguments)` in every process of a group; what they return, in the order of ranks.

    `function` must be importable (a module-level function), arguments and results must be picklable.
    """
    with tempfile.TemporaryDirectory() as folder:
        spawn(_process, (function, arguments, processes, folder), nprocs=processes)
        return [
            torch.load(Path(folder) / f"result-{rank}.pt", weights_only=False)  # written by the line below
            for rank in range(processes)
        ]


def _process(rank: int, function: Callable[..., Any], arguments: tuple[Any, ...], processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    # Accelerate asks the environment, as `torchrun` sets it, and not the process group.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes)
    try:
        torch.save(function(rank, *arguments), Path(folder) / f"result-{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
