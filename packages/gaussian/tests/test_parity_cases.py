"""Every parity case of GaussianToken's parts in this package: all stages of what the original computes, by ours.

A case is run by the runner with the longest prefix of its name; the modules `gaussian_parity_*` beside the cases hold
the runners. A case without a runner, or a stage that its runner does not give, fails.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from smalti.core.testing.parity import check_case, chosen_cases, load_runners

FOLDER = Path(__file__).parent / "parity"
FAMILIES = ("gaussiantoken-op-deform-attn", "gaussiantoken-op-rasterize")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "path" not in metafunc.fixturenames:
        return
    folder = metafunc.config.getoption("--parity-cases", default=None)
    cases = chosen_cases(FOLDER, folder, FAMILIES)
    metafunc.parametrize("path", cases.values(), ids=cases.keys())


@pytest.fixture(scope="module")
def runners() -> dict:
    return load_runners(FOLDER, "gaussian_parity_*.py")


@pytest.mark.parity
def test_case(path: Path, runners: dict) -> None:
    check_case(path, runners)
