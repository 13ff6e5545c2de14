import json
import sys

import pytest

from smalti.core.errors import UserError
from smalti.core.plugins import PluginWarning, Registry


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a distribution with one plugin module on the path."""
    monkeypatch.syspath_prepend(tmp_path)
    modules = []

    def install(name, source, module=None):
        module = module or name.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{module}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(f"[smalti]\n{name} = {module}\n")
        modules.append(module)
        return tmp_path

    yield install
    for module in modules:
        sys.modules.pop(module, None)


def plugin(kind, name, target):
    return f"""
from smalti.core.plugins import Component, hookimpl

@hookimpl
def smalti_register():
    yield Component({kind!r}, {name!r}, {target!r}, "a test")
"""


def test_components_are_found_with_their_distribution():
    registry = Registry()
    assert "cnn" in registry.names("encoder")
    (core,) = [plugin for plugin in registry.plugins() if plugin.name == "core"]
    assert (core.distribution, core.status) == ("smalti-core", "loaded")
    assert registry.options("encoder", "cnn").__name__ == "CNNEncoderOptions"


def test_unknown_name_says_what_is_installed():
    with pytest.raises(UserError, match=r"unknown quantizer 'fsqq'; installed: signs$"):
        Registry("core,toy").component("quantizer", "fsqq")


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import does_not_exist", "ModuleNotFoundError: No module named 'does_not_exist'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        (plugin("flavour", "x", "y:z"), "unknown kind 'flavour' of 'x'"),
        ("from smalti.core.plugins import hookimpl\n@hookimpl\ndef smalti_register():\n    yield 3", "got 3"),
        ("from smalti.core.plugins import hookimpl\n@hookimpl\ndef smalti_register():\n    raise KeyError('k')", "'k'"),
    ],
)
def test_a_broken_plugin_is_a_warning_and_the_rest_works(install, source, error):
    install("broken-plugin", source)
    registry = Registry()
    with pytest.warns(PluginWarning, match="plugin 'broken-plugin' of broken-plugin 1.5 could not be loaded"):
        plugins = registry.plugins()
    (broken,) = [plugin for plugin in plugins if plugin.name == "broken-plugin"]
    assert broken.status == "failed"
    assert error in broken.error
    assert "cnn" in registry.names("encoder")
    with pytest.raises(UserError, match=r"unknown loss 'mine'.*'broken-plugin' of broken-plugin 1.5 failed to load"):
        registry.component("loss", "mine")


def test_two_claims_of_one_name_are_an_error_that_names_both(install):
    install("other-cnn", plugin("encoder", "cnn", "other:Options"))
    registry = Registry("core,other-cnn")
    with pytest.raises(UserError, match=r"encoder 'cnn' is registered twice, by smalti-core \S+ and other-cnn 1.5: "):
        registry.component("encoder", "cnn")
    assert registry.duplicates() == ["encoder 'cnn': smalti-core 0.1.0 and other-cnn 1.5"]
    assert registry.component("decoder", "cnn")


def test_a_component_that_cannot_be_imported_names_its_distribution(install):
    install("half-plugin", plugin("loss", "half", "half_missing:Options"))
    with pytest.raises(UserError, match=r"loss 'half' of half-plugin 1.5 cannot be imported from half_missing:Options"):
        Registry().options("loss", "half")


def test_selection_limits_and_blocks():
    only = Registry("toy")
    assert only.names("encoder") == []
    assert only.names("quantizer") == ["signs"]
    without = Registry("-toy")
    assert "signs" not in without.names("quantizer")
    assert {plugin.name: plugin.status for plugin in without.plugins()}["toy"] == "blocked"


def test_listing_needs_no_torch(smalti, install, tmp_path):
    heavy = install("heavy-plugin", plugin("loss", "heavy", "heavy_components:Options"))
    (heavy / "heavy_components.py").write_text("import torch")
    (heavy / "sitecustomize.py").write_text(
        "import sys, atexit\natexit.register(lambda: sys.stderr.write(f\"torch {'torch' in sys.modules}\"))"
    )
    for arguments in (["plugins"], ["--help"], ["recipes"], ["train", "--help"], ["compare", "--help"]):
        done = smalti(*arguments, PYTHONPATH=str(heavy), SMALTI_PLUGINS="core,heavy-plugin")
        assert done.returncode == 0, done.stderr
        assert "torch False" in done.stderr, arguments
    assert "torch" in sys.modules


def test_plugins_command(smalti, install):
    path = install("broken-plugin", "raise RuntimeError('no luck')")
    done = smalti("plugins", "--json", "--check", PYTHONPATH=str(path), SMALTI_PLUGINS="core,broken-plugin")
    assert done.returncode == 1
    listed = {plugin["plugin"]: plugin for plugin in json.loads(done.stdout)}
    assert listed["broken-plugin"]["error"] == "RuntimeError: no luck"
    assert listed["broken-plugin"]["version"] == "1.5"
    assert {"kind": "encoder", "name": "cnn", "summary": "residual CNN, halving per level"} in listed["core"][
        "components"
    ]
    assert done.stderr.startswith("smalti: warning: plugin 'broken-plugin' of broken-plugin 1.5 could not be loaded")
    healthy = smalti("plugins", "--check")
    assert healthy.returncode == 0
    assert "encoder" in healthy.stdout
