"""Every parity case of a published model, through the import path: fill the layout, import it, run it.

A case is run by the runner with the longest prefix of its name; the modules `parity/published_*.py` hold the runners.
A case without a runner, or a stage that its runner does not give, fails.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from smalti.core.testing.parity import check_case, load_runners, parametrize_cases

FOLDER = Path(__file__).parent / "parity"
# Case names of the families whose models are published; operators, losses and generators are tested elsewhere.
FAMILIES = (
    "fqgan-dual-",
    "fqgan-triple-",
    "gaussiantoken-cifar",
    "gaussiantoken-embed-options",
    "gaussiantoken-imagenet",
    "gaussiantoken-mini-",
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
    "var-edit-",
    "var-generator-",
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
ELSEWHERE = ("titok-losses",)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize_cases(metafunc, FOLDER, FAMILIES, ELSEWHERE)


@pytest.mark.slow
@pytest.mark.parity
def test_case(path: Path) -> None:
    check_case(path, load_runners(FOLDER, "published_*.py"))
