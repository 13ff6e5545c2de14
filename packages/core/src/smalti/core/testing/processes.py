"""Running a function in two processes that form a gloo group, as the distributed parts of the contracts need.

Starting processes takes seconds, so they live on and serve the next call; they end with the process that started them.
"""

from __future__ import annotations

import atexit
import importlib.util
import inspect
import multiprocessing
import os
import pickle
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException


def run_in_processes(
    function: Callable[..., Any], *arguments: Any, processes: int = 2, timeout: float = 300.0
) -> list[Any]:
    """Call `function(rank, *arguments)` in every process of a group; what they return, in the order of ranks.

    Calls share the processes for as long as nothing fails and the working directory, the environment and the import
    path stay the same. Seeds are set anew for each call; everything else that is global, such as the process group,
    `function` must leave as it finds it.

    Args:
        function: of a module's top level, also of a test module; it may use the process group, which is set up.
        arguments: picklable, as are the results.
        processes: size of the group.
        timeout: seconds that the call may take.

    Raises:
        ProcessRaisedException: `function` raised; with the traceback.
        ProcessExitedException: a process ended.
        TimeoutError: the processes did not finish in time.
    """
    global _group  # noqa: PLW0603
    # Test modules have names by which only pytest can import them: their file goes along.
    call = pickle.dumps((function.__module__, inspect.getsourcefile(function), pickle.dumps((function, arguments))))
    started_for = (processes, _surroundings())
    if _group is None or _group.started_for != started_for:
        _end_group()
        _group = _Group(*started_for)
    try:
        return _group.run(call, timeout)
    except BaseException:
        # What the other processes are in the middle of is unknown.
        _end_group()
        raise


def _surroundings() -> tuple[Path, list[str], dict[str, str]]:
    """What a process takes over from the one that starts it."""
    changing = "PYTEST_CURRENT_TEST"
    return Path.cwd(), list(sys.path), {name: value for name, value in os.environ.items() if name != changing}


class _Group:
    """Processes that wait for calls, each at the end of a pipe."""

    def __init__(self, size: int, surroundings: tuple[Path, list[str], dict[str, str]]) -> None:
        self.started_for = (size, surroundings)
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection[bytes, bytes]] = []
        context = multiprocessing.get_context("spawn")
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, self._folder.name, theirs))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._pids = [process.pid or 0 for process in self._processes]

    def run(self, call: bytes, timeout: float) -> list[Any]:
        """The results of a pickled call, by rank."""
        deadline = time.monotonic() + timeout
        results: list[Any] = [None] * len(self._processes)
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        try:
            for pipe in self._pipes:
                pipe.send_bytes(call)
            while waiting:
                ready = wait([*waiting], max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise TimeoutError(f"the processes did not finish within {timeout:g} s")
                for pipe in self._pipes:
                    if pipe in ready:
                        rank = waiting.pop(pipe)
                        results[rank], error = pickle.loads(pipe.recv_bytes())
                        if error:
                            raise ProcessRaisedException(f"process {rank}:\n{error}", rank, self._pids[rank])
        except Exception:
            self._check_alive()  # when one process ends, the others raise
            raise
        return results

    def _check_alive(self) -> None:
        ended = wait([process.sentinel for process in self._processes], 1.0)  # one may be just ending
        for rank, process in enumerate(self._processes):
            if process.sentinel in ended:
                process.join()
                code = process.exitcode or 0
                message = f"process {rank} ended with exit code {code}"
                raise ProcessExitedException(message, rank, self._pids[rank], code)

    def end(self) -> None:
        """End all processes, the only way that nothing in them can hold up."""
        for process, pipe in zip(self._processes, self._pipes, strict=True):
            process.kill()
            process.join()
            pipe.close()
        self._folder.cleanup()


_group: _Group | None = None


@atexit.register
def _end_group() -> None:
    global _group
    group, _group = _group, None
    if group is not None:
        group.end()


def _serve(rank: int, size: int, folder: str, pipe: Connection[bytes, bytes]) -> None:
    """Answer calls until the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it too
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    # Accelerate asks the environment, as `torchrun` sets it, and not the process group.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    while True:
        call = pipe.recv_bytes()
        try:
            # As in fresh processes: torch's seed is the same in all, the others are not.
            torch.manual_seed(0)
            random.seed(rank)
            np.random.seed(rank)
            module, path, content = pickle.loads(call)
            _import(module, path)
            function, arguments = pickle.loads(content)
            reply = pickle.dumps((function(rank, *arguments), None))
            dist.barrier()  # a collective that the others never joined is this call's error, not the next one's
        except Exception:  # noqa: BLE001
            reply = pickle.dumps((None, traceback.format_exc()))
        pipe.send_bytes(reply)


def _import(module: str, path: str) -> None:
    """Import a module by its name, or else from its file."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError:
        *parents, _ = module.split(".")
        for depth in range(len(parents)):  # pickle asks for the first of them
            name = ".".join(parents[: depth + 1])
            sys.modules.setdefault(name, ModuleType(name))
        spec = importlib.util.spec_from_file_location(module, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[module] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[module])


def _end_with_parent() -> None:
    """Also when the parent is killed, and also in the middle of a call."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
