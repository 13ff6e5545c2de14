"""Every parity case of metrics; see `smalti.core.testing.parity`."""

from __future__ import annotations

from pathlib import Path

import pytest

from smalti.core.testing.parity import check_case, load_runners, parametrize_cases

FOLDER = Path(__file__).parent / "parity"
FAMILIES = ("fqgan-adm-metrics", "gaussiantoken-metrics", "vistok-metrics")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize_cases(metafunc, FOLDER, FAMILIES)


@pytest.mark.parity
def test_case(path: Path) -> None:
    check_case(path, load_runners(FOLDER, "eval_parity_*.py"))
