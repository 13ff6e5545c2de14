"""Two gloo processes with different data hold the same codebook, that of all the data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from smalti.core.codebook_health import CodebookHealth
from smalti.quant.entropy import bits_entropy
from smalti.quant.vector import VectorQuantizerOptions

STEP = {"dim": 4, "codebook_size": 24, "update": "ema", "revive_after": 5}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "options": STEP,
        "latent": torch.randn(6, 20, 4, generator=generator),
        "tokens": torch.randint(40, (4, 10, 1), generator=generator),
        "logits": torch.randn(16, 4, dtype=torch.float64, generator=generator),
    }


@pytest.fixture(scope="module")
def results(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("two_processes")
    torch.save(data, folder / "inputs.pt")
    program = Path(__file__).with_name("two_processes.py")
    done = subprocess.run([sys.executable, program, folder], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("update", ["loss", "ema"])
def test_replicas_stay_equal_to_the_last_bit(results: Any, update: str) -> None:
    first, second = (result[update] for result in results)
    assert bool(first["1.learning.initialised"])
    assert first["1.learning.revival.step"] == 6
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_a_step_of_two_is_that_of_one_on_the_whole_batch(results: Any, data: dict[str, Any]) -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizerOptions(**STEP).build().train()
    start = quantizer.codebook.clone()
    quantizer(data["latent"])
    for state in (result["step"] for result in results):
        torch.testing.assert_close(state, dict(quantizer.state_dict()))
        assert not torch.equal(state["codebook"], start)


def test_health_is_that_of_all_tokens(results: Any, data: dict[str, Any]) -> None:
    health = CodebookHealth((50,))
    health.update(data["tokens"])
    assert [result["health"] for result in results] == [health.result()] * 2


def test_the_mean_distribution_is_that_of_all_tokens(results: Any, data: dict[str, Any]) -> None:
    whole = data["logits"].clone().requires_grad_()
    batch = bits_entropy(whole).batch
    batch.backward()
    for value, _ in (result["entropy"] for result in results):
        torch.testing.assert_close(value, batch.detach())
    # Data parallel training averages the gradients of the processes, hence the half.
    gradient = torch.cat([gradient for _, gradient in (result["entropy"] for result in results)]) / 2
    torch.testing.assert_close(gradient, whole.grad)
