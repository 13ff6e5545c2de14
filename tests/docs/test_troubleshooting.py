"""docs/troubleshooting.md quotes sentences that smalti says, and every module that refuses something has its area."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
QUOTED = re.findall(r"^\| `(.+?)` \|", PAGE, re.MULTILINE)
# The contracts' own tests refuse what no user gives.
NOT_A_USERS = ("core.testing",)


@pytest.fixture(scope="module")
def sentences() -> dict[str, list[str]]:
    spec = importlib.util.spec_from_file_location("error_sentences", ROOT / "tools" / "error_sentences.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return {module.removeprefix("smalti."): found for module, found in tool.sentences().items()}


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_quoted_sentence_is_said(quoted: str, sentences: dict[str, list[str]]) -> None:
    said = [sentence for found in sentences.values() for sentence in found]
    assert any(quoted.strip() in sentence for sentence in said), f"nothing in the code says {quoted!r}"


def areas() -> dict[str, tuple[list[str], list[str]]]:
    """The modules of each section, and what it quotes."""
    found = {}
    for section in PAGE.split("\n## ")[1:]:
        title, _, text = section.partition("\n")
        modules = re.search(r"^Modules: ((?:`[\w.]+`,?\s+)+)", text, re.MULTILINE)
        if modules:
            found[title] = (
                re.findall(r"`([\w.]+)`", modules[1]),
                re.findall(r"^\| `(.+?)` \|", text, re.MULTILINE),
            )
    return found


def within(module: str, prefixes: list[str]) -> bool:
    return any(f"{module}.".startswith(f"{prefix}.") for prefix in prefixes)


def test_every_module_that_refuses_something_has_its_area(sentences: dict[str, list[str]]) -> None:
    named = [prefix for prefixes, _ in areas().values() for prefix in prefixes]
    lost = [module for module in sentences if not within(module, [*named, *NOT_A_USERS])]
    assert not lost, f"name them in a section of docs/troubleshooting.md, and quote what needs a cure: {lost}"


@pytest.mark.parametrize("title", areas())
def test_a_section_quotes_its_own_modules(title: str, sentences: dict[str, list[str]]) -> None:
    prefixes, quoted = areas()[title]
    own = [sentence for module, found in sentences.items() if within(module, prefixes) for sentence in found]
    assert quoted
    assert all(any(each.strip() in sentence for sentence in own) for each in quoted)
