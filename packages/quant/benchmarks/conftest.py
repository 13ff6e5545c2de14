"""What the benchmarks of quantizers share: their peer, and one thread as well as two."""

from __future__ import annotations

import importlib
from typing import Any

import pytest


@pytest.fixture
def library() -> Any:
    """vector-quantize-pytorch, of the dependency group `benchmark`; imported here, so that all can be collected."""
    return importlib.import_module("vector_quantize_pytorch")


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> int:
    return int(request.param)
