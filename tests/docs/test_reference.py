"""The reference has no gaps: every option is described, every command helps, every public name has a docstring."""

import ast
import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from smalti.core.plugins import registry
from smalti.core.recipe import Recipe

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference_pages", ROOT / "tools" / "reference_pages.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_every_option_is_described(pages: ModuleType) -> None:
    models = {"recipe": Recipe} | {
        f"{kind} {name}": registry().options(kind, name)
        for kind in pages.WITH_OPTIONS
        for name in registry().names(kind)
        if not registry().component(kind, name).target.startswith("smalti_example")
    }
    gaps = [f"{of}: {path}" for of, model in models.items() for path, _, text in pages.options(model, "") if not text]
    assert not gaps


def test_options_of_recipes_are_what_overrides_take(pages: ModuleType) -> None:
    text = pages.recipes_page()
    for path in ("train.tokenizer.steps", "sample.guidance_scale", "tokenize.flip", "data.workers", "seed"):
        assert f"| `{path}` |" in text, path
    assert "| `quantizer` |" not in text, "components have pages of their own"
    assert "| `codebook_size` |" in pages.components_page("quantizer")


def test_every_command_is_there_and_tells_what_it_takes(pages: ModuleType) -> None:
    text = pages.commands_page()
    for name in ("run", "train tokenizer", "evaluate", "evaluate images", "fit", "shards make", "zoo"):
        assert f"\n## {name}\n" in text
    assert "|  |\n" not in text.replace("| --- | --- | --- |", "").replace("|  | default |  |\n", ""), "a gap in a help"


def test_commands_named_in_sentences_exist(pages: ModuleType) -> None:
    commands = pages.commands()
    markdown = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("packages/*/README.md")]
    found = [
        (path.name, written)
        for path in markdown
        if path.name != "CHANGELOG.md"
        for written in re.findall(r"`(smalti [a-z][^`\n]*)`", path.read_text())
    ]
    assert len(found) > 50
    for page, written in found:
        words = shlex.split(written)[1:]
        if len(words) > 1 and f"{words[0]} {words[1].removeprefix('--')}" in commands:  # as `evaluate --compare`
            words[1] = words[1].removeprefix("--")
        named = [name for name in (" ".join(words[:2]), words[0]) if name in commands]
        groups = {name.partition(" ")[0] for name in commands}
        assert named or (len(words) == 1 and words[0] in groups), f"{page}: {written}"
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        known = {
            option for name in named for each in commands[name].params for option in (*each.opts, *each.secondary_opts)
        }
        assert options <= known | {"--help"}, f"{page}: {written}"


def test_every_public_module_has_a_page(pages: ModuleType) -> None:
    listed = {module for _, modules in pages.rooms().values() for module in modules}
    assert {"smalti.core.contracts", "smalti.quant.vector", "smalti.eval.frechet", "smalti.generation.var"} <= listed
    for module in listed:
        package = module.split(".")[1]
        path = ROOT / "packages" / package / "src" / Path(*module.split(".")).with_suffix(".py")
        assert ast.get_docstring(ast.parse(path.read_text())), module
