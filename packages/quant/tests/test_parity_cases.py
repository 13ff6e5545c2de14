"""Every parity case of the quantizer families: all stages of what the originals compute, by our quantizers.

A case is run by the runner with the longest prefix of its name; the modules `quant_parity_*` beside the cases hold
the runners. A case without a runner, or a stage that its runner does not give, fails.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from smalti.core.testing.parity import check_case, load_runners, parametrize_cases

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
    parametrize_cases(metafunc, FOLDER, FAMILIES, ELSEWHERE)


@pytest.mark.parity
def test_case(path: Path) -> None:
    check_case(path, load_runners(FOLDER, "quant_parity_*.py"))
