"""Mutated files in front of every reader: a right result or one sentence, and nothing done that the file says.

`SMALTI_FUZZ_INPUTS=10000` gives each reader so many.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "worker.py"
INPUTS = int(os.environ.get("SMALTI_FUZZ_INPUTS", "200"))


@pytest.mark.slow
def test_readers_of_mutated_files(tmp_path):
    out = tmp_path / "findings.json"
    command = [sys.executable, WORKER, "--inputs", str(INPUTS), "--out", out]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SMALTI_PLUGINS": "-toy"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text())
    assert len(results) == 20
    assert {name: result["inputs"] for name, result in results.items()} == dict.fromkeys(results, INPUTS)
    findings = {name: result["findings"] for name, result in results.items() if result["findings"]}
    assert not findings, json.dumps(findings, indent=2)


MISTAKES = {
    "raise KeyError('x')": "KeyError in ",
    "os.system('touch executed')": "something was done",
    "__import__('toy_side_effect')": "something was done",
    "open('left', 'w').close()": "something was done",
    "raise UserError('it is damaged')": "no file is named",
    "raise UserError(f'{folder} is damaged' + 'x' * 2000)": "too long a sentence",
    "warnings.warn('odd', UserWarning)": "warning UserWarning",
    "os.abort()": "the process ended by signal SIGABRT",
    "while True: pass": "the process ended by signal SIGPROF",
    "time.sleep(99)": "the process ended by signal SIGALRM",
    "bytearray(900 << 20)": "too much memory",
    "bytearray(9000 << 20)": "MemoryError in ",
}
WRONG = """
import json, os, sys, time, warnings
sys.path.insert(0, sys.argv[1])
import worker
from smalti.core.errors import UserError

worker.SECONDS, worker.WAITING = 3.0, 6.0

def found(mistake):
    def read(folder):
        if (folder / "a.txt").read_bytes() != b"whole":
            exec(mistake, {**globals(), "folder": folder})

    worker.READERS = {"wrong": worker.Reader(lambda folder: (folder / "a.txt").write_bytes(b"whole"), read)}
    return list(worker.fuzzed("wrong", 0, 1, 0, keep=False)["findings"])

print(json.dumps([found(mistake) for mistake in sys.argv[2:]]))
"""


@pytest.mark.slow
def test_the_worker_finds_what_is_wrong(tmp_path):
    """Readers that make a mistake once their file has changed."""
    command = [sys.executable, "-c", WRONG, WORKER.parent, *MISTAKES]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    for (mistake, expected), found in zip(MISTAKES.items(), json.loads(done.stdout), strict=True):
        assert any(one.startswith(expected) for one in found), (mistake, found)
