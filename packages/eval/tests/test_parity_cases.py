"""Every parity case of metrics; see `smalti.core.testing.parity`."""

from __future__ import annotations

from pathlib import Path

import pytest

from smalti.core.testing.parity import check_case, chosen_cases, load_runners

FOLDER = Path(__file__).parent / "parity"
FAMILIES = ("fqgan-adm-metrics", "gaussiantoken-metrics", "vistok-metrics")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "path" in metafunc.fixturenames:
        cases = chosen_cases(FOLDER, metafunc.config.getoption("--parity-cases", default=None), FAMILIES)
        metafunc.parametrize("path", [pytest.param(path, id=name) for name, path in cases.items()])


@pytest.fixture(scope="module")
def runners() -> dict:
    return load_runners(FOLDER, "eval_parity_*.py")


@pytest.mark.parity
def test_case(path: Path, runners: dict) -> None:
    check_case(path, runners)
