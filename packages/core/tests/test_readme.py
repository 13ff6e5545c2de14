"""The README's example is a plugin that works."""

import re
import sys
from pathlib import Path

import torch

from smalti.core.contracts import TokenizerOutput
from smalti.core.plugins import Registry


def test_the_plugin_of_the_readme(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)
    (tmp_path / "readme_plugin.py").write_text(code)
    info = tmp_path / "readme_plugin-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: readme-plugin\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[smalti]\nreadme = readme_plugin\n")
    monkeypatch.syspath_prepend(tmp_path)
    options = Registry("core,readme").options("loss", "smooth-l1")
    output = TokenizerOutput(torch.zeros(3), torch.zeros(0), {})
    assert options(weight=2.0).build()(output, torch.ones(3), 0).item() == 0.5
    del sys.modules["readme_plugin"]
