"""Functions run in two processes, which live on, are replaced after any failure, and end with their parent."""

import importlib
import os
import re
import subprocess
import sys
import time

import pytest
import torch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from smalti.core.testing.processes import run_in_processes

pytestmark = pytest.mark.slow


@pytest.fixture
def toy(toy_plugin):
    """A module that the processes can import too."""
    return importlib.import_module("toy_processes")


def test_calls_share_processes_and_nothing_else(toy):
    both = run_in_processes(toy.process)
    assert len(set(both)) == 2
    first, second = run_in_processes(toy.summed, torch.tensor([1.0, 2.0]))
    assert torch.equal(first[0], torch.tensor([3.0, 5.0]))
    assert torch.equal(second[0], first[0])
    assert first[1] == second[1]
    assert first[2] != second[2]
    assert [again[1:] for again in run_in_processes(toy.summed, torch.zeros(()))] == [first[1:], second[1:]]
    assert run_in_processes(toy.process) == both


def test_what_cannot_be_pickled_ends_nothing(toy):
    both = run_in_processes(toy.process)
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        run_in_processes(toy.process, lambda: None)
    assert run_in_processes(toy.process) == both


def test_an_error_in_one_comes_with_its_traceback(toy):
    before = run_in_processes(toy.process)
    with pytest.raises(ProcessRaisedException, match=r"^process 1:\n") as raised:
        run_in_processes(toy.one_raises)
    assert re.search(r"in one_raises\n.*\n\s*LookupError: no such tile\n", str(raised.value))
    assert raised.value.error_pid == before[1]
    assert not {*before} & {*run_in_processes(toy.process)}


def test_the_end_of_one_is_told(toy):
    before = run_in_processes(toy.process)
    with pytest.raises(ProcessExitedException, match=r"^process 1 ended with exit code 3$"):
        run_in_processes(toy.one_ends)
    assert not {*before} & {*run_in_processes(toy.process)}


def test_a_call_that_takes_too_long_is_told(toy):
    before = run_in_processes(toy.process)
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"^the processes did not finish within 0.5 s$"):
        run_in_processes(toy.one_hangs, timeout=0.5)
    assert time.monotonic() - started < 60
    assert not {*before} & {*run_in_processes(toy.process)}


def test_another_environment_gets_other_processes(toy, monkeypatch):
    before = run_in_processes(toy.process)
    monkeypatch.setenv("COLOUR_OF_TILES", "blue")
    assert run_in_processes(toy.variable, "COLOUR_OF_TILES") == ["blue", "blue"]
    assert not {*before} & {*run_in_processes(toy.process)}


def test_processes_end_with_a_killed_parent(toy, tmp_path):
    started = [tmp_path / f"started-{rank}" for rank in range(2)]
    program = [sys.executable, toy.__file__, tmp_path / "started"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # what a killed process leaves there
    with subprocess.Popen(program, env=environment, stdout=subprocess.PIPE) as parent:
        deadline = time.monotonic() + 120
        while not all(path.exists() for path in started):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        parent.kill()
        # They hold the other end of the pipe too: this returns when all have ended.
        parent.communicate(timeout=60)
    assert parent.returncode == -9
