"""Fixtures of the tests of smalti.generation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from smalti.core.layout import TokenLayout
from smalti.core.testing.parity import read_case
from smalti.generation.ar import AR, AROptions

FOLDER = Path(__file__).parent / "parity"


@pytest.fixture(scope="session")
def load_case() -> Callable[[str], dict[str, Any]]:
    """Parity cases by name."""
    return lambda name: read_case(FOLDER / f"{name}.json.gz")


@pytest.fixture
def p_value() -> Callable[[Tensor, Tensor], float]:
    """Of Pearson's chi-square test: the counts of outcomes against their probabilities."""

    def p_value(counts: Tensor, probabilities: Tensor) -> float:
        expected = counts.sum() * probabilities.double()
        statistic = ((counts - expected).square() / expected).sum()
        return float(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2))

    return p_value


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
