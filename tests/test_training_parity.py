"""Every parity case of training and judging that needs several packages: losses over codes, whole passes, schedules.

A case is run by the runner with the longest prefix of its name; the modules `parity/training_*.py` hold the runners.
A case without a runner, or a stage that its runner does not give, fails.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from smalti.core.testing.parity import check_case, chosen_cases, load_runners

FOLDER = Path(__file__).parent / "parity"
FAMILIES = ("fqgan-training-losses", "gaussiantoken-metrics", "gaussiantoken-schedules", "xqgan-training-forward")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "path" not in metafunc.fixturenames:
        return
    folder = metafunc.config.getoption("--parity-cases", default=None)
    cases = chosen_cases(FOLDER, folder, FAMILIES)
    metafunc.parametrize("path", cases.values(), ids=cases.keys())


@pytest.fixture(scope="module")
def runners() -> dict:
    return load_runners(FOLDER, "training_*.py")


@pytest.mark.slow
@pytest.mark.parity
def test_case(path: Path, runners: dict) -> None:
    check_case(path, runners)
