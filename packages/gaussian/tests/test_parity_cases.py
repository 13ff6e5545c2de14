"""Every parity case of GaussianToken's parts in this package: all stages of what the original computes, by ours.

A case is run by the runner with the longest prefix of its name; the modules `gaussian_parity_*` beside the cases hold
the runners. A case without a runner, or a stage that its runner does not give, fails.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from smalti.core.testing.parity import check_case, load_runners, parametrize_cases

FOLDER = Path(__file__).parent / "parity"
FAMILIES = ("gaussiantoken-op-deform-attn", "gaussiantoken-op-rasterize")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize_cases(metafunc, FOLDER, FAMILIES)


@pytest.mark.parity
def test_case(path: Path) -> None:
    check_case(path, load_runners(FOLDER, "gaussian_parity_*.py"))
