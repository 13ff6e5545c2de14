"""Fixtures of the tests of smalti.generation."""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from smalti.core.layout import TokenLayout
from smalti.generation.ar import AR, AROptions

FOLDER = Path(__file__).parent / "parity"


@pytest.fixture(scope="session")
def parity() -> ModuleType:
    """The rules by which weights and inputs of a parity case are filled, and outputs compared."""
    spec = importlib.util.spec_from_file_location("generation_parity", FOLDER / "parity.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def load_case() -> Callable[[str], dict[str, Any]]:
    """Parity cases by name."""
    return lambda name: json.loads(gzip.decompress((FOLDER / f"{name}.json.gz").read_bytes()))


@pytest.fixture
def build() -> Callable[..., AR]:
    """Build a small AR in evaluation mode, every weight away from its special initial value."""

    def build(layout: TokenLayout | None = None, classes: int = 5, **options: Any) -> AR:
        torch.manual_seed(0)
        small = {"layers": 2, "dim": 32, "heads": 4, "ffn_multiple": 8, **options}
        model = AROptions(**small).build(layout or TokenLayout.grid(3, 4, (16,)), classes)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn(weight.shape), alpha=0.2)
        return model.eval()

    return build
