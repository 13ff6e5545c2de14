"""The README's code runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest


def test_the_code_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["drawn"].shape == (10, 64, 1)
    assert names["loss"].item() > 0
