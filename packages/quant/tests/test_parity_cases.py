"""Every parity case of the quantizer families: all stages of what the originals compute, by our quantizers.

A case is run by the runner with the longest prefix of its name; the modules `quant_parity_*` beside the cases hold
the runners. A case without a runner, or a stage that its runner does not give, fails.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from smalti.core.testing.parity import check_case, chosen_cases, load_runners

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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "path" not in metafunc.fixturenames:
        return
    folder = metafunc.config.getoption("--parity-cases", default=None)
    cases = chosen_cases(FOLDER, folder, FAMILIES, ELSEWHERE)
    metafunc.parametrize("path", cases.values(), ids=cases.keys())


@pytest.fixture(scope="module")
def runners() -> dict:
    return load_runners(FOLDER, "quant_parity_*.py")


@pytest.mark.parity
def test_case(path: Path, runners: dict) -> None:
    check_case(path, runners)
