"""The peers of the benchmarks, `originals*.py`, are imported by name."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
