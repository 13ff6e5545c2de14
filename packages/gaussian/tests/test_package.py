"""The package: a cheap import, a valid plugin, a README whose example runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import smalti.gaussian
from smalti.core.plugins import registry
from smalti.gaussian.rasterizer.rasterize import rasterize_gaussians_2d

README = Path(__file__).parents[1] / "README.md"


def test_import_costs_no_torch():
    code = "import sys, smalti.gaussian, smalti.gaussian.plugin; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_operators_are_imported_on_first_use():
    assert smalti.gaussian.rasterize_gaussians_2d is rasterize_gaussians_2d
    assert set(smalti.gaussian.__all__) <= set(dir(smalti.gaussian))
    with pytest.raises(AttributeError, match=r"module 'smalti\.gaussian' has no attribute 'splat'"):
        _ = smalti.gaussian.splat


def test_plugin_names_its_components():
    plugin = next(plugin for plugin in registry().plugins() if plugin.name == "gaussian")
    assert plugin.status == "loaded"
    assert {("tokenizer", "gaussiantoken"), ("checkpoint", "gaussiantoken")} <= {
        (component.kind, component.name) for component in plugin.components
    }


def test_readme_example_renders_an_image(tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, str(README), "exec"), {})
    content = (tmp_path / "gaussians.ppm").read_bytes()
    header = b"P6 256 192 255\n"
    assert content.startswith(header)
    pixels = content.removeprefix(header)
    assert len(pixels) == 3 * 256 * 192
    assert len(set(pixels)) > 100
