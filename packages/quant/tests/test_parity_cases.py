"""Every parity case of the quantizer families: all stages of what the originals compute, by our quantizers.

A case is run by the runner with the longest prefix of its name; the modules `quant_parity_*` beside the cases hold
the runners. A case without a runner, or a stage that its runner does not give, fails.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent / "parity"
# What this package answers for; whole tokenizers and transformers under `quant-` belong to other packages.
FAMILIES = (
    "quant-vistok-",
    "quant-lucid-",
    "quant-magvit2-",
    "quant-taming-",
    "quant-ibq",
    "var-quantizer",
    "xqgan-quantizers",
    "gaussiantoken-quantizer",
    "sejal1d-quantizer-",
    "titok-quantizer-",
)
ELSEWHERE = ("quant-ibq-16384", "quant-ibq-262144", "quant-ibq-llama", "quant-ibq-small", "quant-ibq-tokenizer")
MODULES = (
    "quant_parity_vector",
    "quant_parity_scalar",
    "quant_parity_composed",
    "quant_parity_gaussiantoken",
    "quant_parity_one_dimensional",
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder = metafunc.config.getoption("--parity-cases", default=None)
    paths = [*FOLDER.glob("*.json.gz"), *(Path(folder).glob("*.json*") if folder else ())]
    chosen = {path.name.split(".json")[0]: path for path in paths}  # a case of the folder goes before ours of its name
    mine = {
        name: path
        for name, path in sorted(chosen.items())
        if name.startswith(FAMILIES) and not name.startswith(ELSEWHERE)
    }
    metafunc.parametrize("path", mine.values(), ids=mine.keys())


@pytest.fixture(scope="module")
def runners() -> dict:
    sys.path.insert(0, str(FOLDER))
    try:
        modules = [importlib.import_module(name) for name in MODULES if (FOLDER / f"{name}.py").exists()]
    finally:
        sys.path.remove(str(FOLDER))
    return {prefix: runner for module in modules for prefix, runner in module.RUNNERS.items()}


@pytest.mark.parity
def test_case(path: Path, runners: dict, parity: ModuleType) -> None:
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
