"""Every parity case of a generator, through the import path: fill the layout, import it, run it.

A case is run by the runner with the longest prefix of its name; the modules `parity/published_*.py` hold the runners.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from smalti.core.testing.parity import Runner, check_case, load_runners, parametrize_cases

FOLDER = Path(__file__).parent / "parity"
WHOLE = ("llamagen-gpt-b-256", "rar-b-reduced")
"""Cases of a whole model, which take more than seconds."""


@cache
def runners() -> dict[str, Runner]:
    return load_runners(FOLDER, "published_*.py")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize_cases(metafunc, FOLDER, tuple(runners()), slow=WHOLE)


@pytest.mark.parity
def test_case(path: Path) -> None:
    check_case(path, runners())
