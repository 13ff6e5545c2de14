"""Commands that plugins bring: in the list without being imported, run like core's own."""

import pytest

from smalti.core.cli import ORDER

PLUGIN = """
from smalti.core.plugins import Component, hookimpl

@hookimpl
def smalti_register():
    yield Component("command", {name!r}, {target!r}, "says how loud")
"""
COMMAND = '''
import sys
from typing import Annotated
import typer
from smalti.core.errors import UserError

sys.stderr.write("imported")


def shout(word: str, times: Annotated[int, typer.Option(min=1, help="How often.")] = 1) -> None:
    """Say it louder."""
    if word == "quiet":
        raise UserError("shout: quiet cannot be shouted")
    typer.echo(word.upper() * times)
'''


@pytest.fixture
def call(smalti, tmp_path):
    """Run the command line with plugins that bring good, broken, ambiguous and forbidden commands."""
    targets = {
        "good": ("shout", "loud:shout"),
        "broken": ("cry", "lout:cry"),
        "one": ("sing", "loud:shout"),
        "two": ("sing", "loud:shout"),
        "thief": ("recipes", "loud:shout"),
    }
    for module, (name, target) in targets.items():
        (tmp_path / f"{module}.py").write_text(PLUGIN.format(name=name, target=target))
        info = tmp_path / f"{module}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.5\n")
        (info / "entry_points.txt").write_text(f"[smalti]\n{module} = {module}\n")
    (tmp_path / "loud.py").write_text(COMMAND)
    environment = {"PYTHONPATH": str(tmp_path), "SMALTI_PLUGINS": ",".join(["core", *targets])}
    return lambda *arguments: smalti(*arguments, **environment)


def test_all_are_listed_and_none_is_imported(call):
    done = call("--help")
    assert done.returncode == 0
    for text in ("quickstart", "shout", "cry", "says how loud", "registered twice"):
        assert text in done.stdout
    assert done.stderr == "smalti: warning: the command 'recipes' of a plugin is hidden by smalti's own\n"
    assert "quickstart" in call("recipes").stdout


def test_commands_are_listed_in_the_order_of_the_work(call):
    lines = call("--help").stdout.splitlines()
    listed = [line.split()[1] for line in lines if line.startswith("│ ") and line[2] not in "- "]
    assert listed == [*ORDER, "cry", "shout", "sing"]


def test_one_runs_like_a_command_of_core(call):
    helped = call("shout", "--help")
    assert "smalti shout [OPTIONS]" in helped.stdout
    assert "How often." in helped.stdout
    assert call("shout", "hey", "--times", 2).stdout == "HEYHEY\n"
    done = call("shout", "quiet")
    assert (done.returncode, done.stderr) == (2, "importedsmalti: shout: quiet cannot be shouted\n")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "cry",
            "command 'cry' of broken 1.5 cannot be imported from lout:cry: ModuleNotFoundError: No module named 'lout'",
        ),
        ("sing", "command 'sing' is registered twice, by one 1.5 and two 1.5: uninstall or block one of them"),
    ],
)
def test_one_that_is_broken_is_a_sentence_when_it_is_called(call, name, sentence):
    done = call(name, "hey")
    assert (done.returncode, done.stderr) == (2, f"smalti: {sentence}\n")
