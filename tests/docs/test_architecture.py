"""What docs/architecture.md names exists, and its picture is of today's imports."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
NAMED = sorted(set(re.findall(r"`((?:core|quant|gaussian|generation|eval)/[\w/]+(?:\.py)?)(?:: ([\w.]+))?`", PAGE)))


def defined(path: Path) -> set[str]:
    """Names of functions and classes of a module, members as `Class.member`."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{member.name}" for member in node.body if isinstance(member, ast.FunctionDef)}
    return found


@pytest.mark.parametrize(("path", "name"), NAMED, ids=[": ".join(filter(None, each)) for each in NAMED])
def test_what_the_walk_names_exists(path: str, name: str) -> None:
    package, _, inside = path.partition("/")
    file = ROOT / "packages" / package / "src" / "smalti" / package / inside
    assert file.exists()
    if name:
        assert name in defined(file)


def test_the_walk_goes_through_every_package() -> None:
    assert {path.partition("/")[0] for path, _ in NAMED} == {"core", "quant", "gaussian", "generation", "eval"}


def test_the_picture_is_of_the_imports() -> None:
    spec = importlib.util.spec_from_file_location("dependency_picture", ROOT / "tools" / "dependency_picture.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.PICTURE.read_text() == tool.picture(), "stale: run `python tools/dependency_picture.py`"
