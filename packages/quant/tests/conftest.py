from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from smalti.core.testing import parity as cases


@pytest.fixture(scope="session")
def parity() -> ModuleType:
    """How cases of what the original systems compute are filled and compared."""
    return cases


@pytest.fixture(scope="session")
def load_case() -> Callable[[str], dict[str, Any]]:
    """Parity cases by name."""
    return lambda name: cases.read_case(Path(__file__).parent / "parity" / f"{name}.json.gz")
