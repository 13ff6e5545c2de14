"""Every parity case of training parts that need no sibling: losses, schedules, averages, images.

A case is run by the runner with the longest prefix of its name; the modules `parity/core_parity_*.py` hold the
runners. A case without a runner, or a stage that its runner does not give, fails.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from smalti.core.testing.parity import check_case, load_runners, parametrize_cases

FOLDER = Path(__file__).parent / "parity"
FAMILIES = (
    "fqgan-image-pipeline",
    "gaussiantoken-losses",
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
    parametrize_cases(metafunc, FOLDER, FAMILIES, slow=SLOW)


@pytest.mark.parity
def test_case(path: Path) -> None:
    check_case(path, load_runners(FOLDER, "core_parity_*.py"))
