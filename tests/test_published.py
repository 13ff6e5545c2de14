"""Every parity case of a published model, through the import path: fill the layout, import it, run it.

A case is run by the runner with the longest prefix of its name; the modules `parity/published_*.py` hold the runners.
A case without a runner, or a stage that its runner does not give, fails.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from smalti.core.testing import parity

FOLDER = Path(__file__).parent / "parity"
# Case names of the families whose models are published; operators, losses and generators are tested elsewhere.
FAMILIES = (
    "fqgan-dual-",
    "fqgan-triple-",
    "llamagen-vq-",
    "maskgitvq-",
    "quant-ibq-16384",
    "quant-ibq-262144",
    "quant-ibq-small",
    "quant-ibq-tokenizer",
    "quant-openmagvit2-1",
    "quant-openmagvit2-2",
    "quant-openmagvit2-small",
    "sejal1d-init",
    "sejal1d-mae",
    "sejal1d-titok",
    "titok-b",
    "titok-l",
    "titok-s",
    "titok-ta-",
    "var-vqvae-",
    "vistok-branch-",
    "vistok-fsqvae-",
    "vistok-ibqvae-",
    "vistok-lfqvae-",
    "vistok-simvqvae-",
    "vistok-titok-",
    "vistok-vqgan-",
    "vistok-vqvae-",
    "xqgan-cnn",
    "xqgan-learned-positions-",
    "xqgan-ms",
    "xqgan-v",
)
ELSEWHERE = ("titok-losses", "xqgan-var-")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "path" not in metafunc.fixturenames:
        return
    folder = metafunc.config.getoption("--parity-cases", default=None)
    paths = [*FOLDER.glob("*.json.gz"), *(Path(folder).glob("*.json*") if folder else ())]
    chosen = {path.name.split(".json")[0]: path for path in paths}  # a case of the folder goes before ours of its name
    mine = {
        name: path
        for name, path in sorted(chosen.items())
        if name.startswith(FAMILIES) and not name.startswith(ELSEWHERE)
    }
    metafunc.parametrize("path", mine.values(), ids=mine.keys())


def _runner_modules() -> list[ModuleType]:
    sys.path.insert(0, str(FOLDER))
    try:
        return [importlib.import_module(path.stem) for path in sorted(FOLDER.glob("published_*.py"))]
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def runners() -> dict:
    return {prefix: run for module in _runner_modules() for prefix, run in getattr(module, "RUNNERS", {}).items()}


@pytest.mark.parity
def test_case(path: Path, runners: dict) -> None:
    case = parity.read_case(path)
    matching = [prefix for prefix in runners if case["name"].startswith(prefix)]
    assert matching, f"no runner knows the case {case['name']} ({path})"
    found = runners[max(matching, key=len)](case, parity)
    missing = case["outputs"].keys() - found.keys()
    assert not missing, f"the runner gives no {', '.join(sorted(missing))}"
    problems = {
        stage: problem for stage, digest in case["outputs"].items() if (problem := parity.compare(digest, found[stage]))
    }
    assert not problems
