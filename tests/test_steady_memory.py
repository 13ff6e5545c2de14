"""Memory does not grow with steps, epochs, validations, checkpoints, samples or evaluated images.

`python tests/steady.py 10000 10000` shows it over ten thousand steps.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STAGES = ("train-tokenizer", "train-generator", "sample", "evaluate")


@pytest.mark.slow
def test_memory_is_steady(tmp_path):
    """Objects tell of leaks of Python's that a hundred steps cannot show in pages; pages of all others."""
    command = [sys.executable, Path(__file__).parent / "steady.py", "120", "240"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SMALTI_PLUGINS": "-toy"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = {}
    for line in done.stdout.splitlines():
        seen.update(json.loads(line))
    assert seen.keys() >= set(STAGES)
    for stage in ("train-tokenizer", "train-generator", "sample"):
        (early, objects), (late, more) = seen[stage][len(seen[stage]) // 2], seen[stage][-1]
        assert more - objects < 100, (stage, seen[stage])
        assert late - early < 12, (stage, seen[stage])
