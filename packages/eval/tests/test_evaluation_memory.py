"""Memory of an evaluation: that of its statistics, however many images there are."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

# In a process of its own: the kernel's record of the largest size (Linux) never falls.
SCRIPT = """
import sys
from pathlib import Path
from smalti.core.progress import Reporter
from smalti.eval.evaluation_sides import Asked
from smalti.eval.image_evaluation import evaluate_images
from smalti.eval.protocols import Protocol

settings = Protocol.model_validate(
    {"name": "p", "summary": "", "extractor": {"name": "pixels", "width": 128}, "metrics": ("fid",)}
)
for count in map(int, sys.argv[2:]):
    evaluate_images(Asked(sys.argv[1], sys.argv[1], settings, count=count), Reporter(quiet=True))
    lines = Path("/proc/self/status").read_text().splitlines()
    print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024)
"""


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4000, 64, 64, 3), np.uint8)
    np.savez(tmp_path / "images.npz", images)
    environment = {
        "PYTHONPATH": str(Path(__file__).parent / "plugin"),
        "SMALTI_PLUGINS": "core,eval,eval-toy",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "images.npz"), "500", "2000", "4000"]
    done = subprocess.run(command, env={**os.environ, **environment}, check=True, capture_output=True, text=True)
    _, one, two = map(float, done.stdout.split())
    # The images themselves are 23 MiB more, features of twice the width that are wanted one by one 2 MiB.
    assert two - one < 4
