from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def parity() -> ModuleType:
    """Cases of what the original systems compute, and how to compare with them."""
    path = Path(__file__).parent / "parity" / "parity.py"
    spec = importlib.util.spec_from_file_location("quant_parity", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
