"""`evaluate` runs a recipe's stage, and beside it commands of plugins."""

import pytest

PLUGIN = """
from smalti.core.plugins import Component, hookimpl

@hookimpl
def smalti_register():
    yield Component("command", "evaluate shout", "loud:shout", "says how loud")
    yield Component("command", "evaluate cry", "lout:cry", "cries")
    yield Component("command", "evaluate recipe", "loud:shout", "would take the place of core's")
"""
COMMAND = '''
import sys
import typer

sys.stderr.write("imported")


def shout(word: str) -> None:
    """Say it louder."""
    typer.echo(word.upper())
'''


@pytest.fixture
def call(smalti, tmp_path):
    """Run the command line with a plugin that adds a good and a broken command to the group."""
    (tmp_path / "loudly.py").write_text(PLUGIN)
    (tmp_path / "loud.py").write_text(COMMAND)
    info = tmp_path / "loudly-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: loudly\nVersion: 1.5\n")
    (info / "entry_points.txt").write_text("[smalti]\nloudly = loudly\n")
    return lambda *arguments: smalti(*arguments, PYTHONPATH=str(tmp_path), SMALTI_PLUGINS="core,loudly")


def test_all_are_listed_and_none_is_imported(call):
    done = call("evaluate", "--help")
    assert done.returncode == 0
    assert done.stderr == ("smalti: warning: the command 'evaluate recipe' of a plugin is hidden by smalti's own\n")
    listed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("│ ") and "--help" not in line]
    assert [word for word in listed if word in ("recipe", "shout", "cry")] == ["recipe", "cry", "shout"]
    assert "shout" not in call("--help").stdout  # they are of the group alone


def test_a_command_of_a_plugin_runs(call):
    assert call("evaluate", "shout", "stop").stdout == "STOP\n"
    assert call("evaluate", "--shout", "stop").stdout == "STOP\n"
    helped = call("evaluate", "shout", "--help")
    assert "evaluate shout [OPTIONS]" in helped.stdout
    assert "Say it louder." in helped.stdout
    broken = call("evaluate", "cry")
    assert broken.returncode == 2
    assert broken.stderr.startswith("smalti: command 'evaluate cry' of loudly 1.5 cannot be imported from lout:cry")


@pytest.mark.parametrize("arguments", [("x",), ("recipe", "x"), ("--out", "y", "x")])
def test_everything_else_is_a_recipe(call, arguments):
    done = call("evaluate", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("smalti: no recipe 'x'")
