"""Every parity case of training and judging that needs several packages: losses over codes, whole passes, schedules.

A case is run by the runner with the longest prefix of its name; the modules `parity/training_*.py` hold the runners.
A case without a runner, or a stage that its runner does not give, fails.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from smalti.core.testing.parity import check_case, load_runners, parametrize_cases

FOLDER = Path(__file__).parent / "parity"
FAMILIES = ("fqgan-training-losses", "gaussiantoken-metrics", "gaussiantoken-schedules", "xqgan-training-forward")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize_cases(metafunc, FOLDER, FAMILIES)


@pytest.mark.slow
@pytest.mark.parity
def test_case(path: Path) -> None:
    check_case(path, load_runners(FOLDER, "training_*.py"))
