"""Every parity case of training parts that need no sibling: losses, schedules, averages, images.

A case is run by the runner with the longest prefix of its name; the modules `parity/core_parity_*.py` hold the
runners. A case without a runner, or a stage that its runner does not give, fails.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from smalti.core.testing import parity

FOLDER = Path(__file__).parent / "parity"
FAMILIES = (
    "fqgan-image-pipeline",
    "gaussiantoken-losses",
    "gaussiantoken-schedules",
    "llamagen-lpips",
    "llamagen-patchgan",
    "llamagen-stylegan-disc",
    "quant-seedvoken-adversarial",
    "sejal1d-loss",
    "titok-discriminator",
    "titok-losses",
    "titok-perceptual",
    "var-lr-schedules",
    "vistok-disc-",
    "vistok-loss-",
    "vistok-preprocess",
    "vistok-schedules-",
    "xqgan-dinodisc",
    "xqgan-losses",
    "xqgan-perturbation",
)
# Networks of tens of millions of weights, filled from their seeds.
SLOW = (
    "gaussiantoken-losses",
    "llamagen-stylegan-disc",
    "sejal1d-loss",
    "titok-",
    "vistok-disc-stylegan",
    "vistok-disc-titokgan",
    "vistok-loss-perceptual-",
    "xqgan-dinodisc",
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "path" not in metafunc.fixturenames:
        return
    folder = metafunc.config.getoption("--parity-cases", default=None)
    paths = [*FOLDER.glob("*.json.gz"), *(Path(folder).glob("*.json*") if folder else ())]
    chosen = {path.name.split(".json")[0]: path for path in paths}  # a case of the folder goes before ours of its name
    mine = {name: path for name, path in sorted(chosen.items()) if name.startswith(FAMILIES)}
    marked = [pytest.param(path, id=name, marks=_marks(name)) for name, path in mine.items()]
    metafunc.parametrize("path", marked)


def _marks(name: str) -> tuple[pytest.MarkDecorator, ...]:
    return (pytest.mark.slow,) if name.startswith(SLOW) else ()


@pytest.fixture(scope="module")
def runners() -> dict:
    sys.path.insert(0, str(FOLDER))
    try:
        modules = [importlib.import_module(path.stem) for path in sorted(FOLDER.glob("core_parity_*.py"))]
    finally:
        sys.path.remove(str(FOLDER))
    return {prefix: run for module in modules for prefix, run in module.RUNNERS.items()}


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
