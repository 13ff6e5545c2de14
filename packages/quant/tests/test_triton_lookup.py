"""The fused kernel, interpreted on the CPU everywhere and compiled where there is a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from smalti.quant import lookup
from smalti.quant.lookup import nearest_code, nearest_code_in_blocks

CASES = Path(__file__).parent / "triton_cases.py"
COMPILE = Path(__file__).parent / "triton_compile.py"


def _cases() -> ModuleType:
    spec = importlib.util.spec_from_file_location("triton_cases", CASES)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_interpreted_it_equals_the_definition() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, CASES], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "all equal\n"


@pytest.mark.slow
def test_it_compiles_without_a_gpu_and_fits_small_cards(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, COMPILE, "8", "64", "256"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shared = [int(size) for size in done.stdout.split()]
    assert len(shared) == 3
    assert max(shared) <= 99 * 1024


def test_without_triton_the_search_goes_through_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "find_spec", lambda name: None)
    lookup._fused_search.cache_clear()
    assert lookup._fused_search() is None
    lookup._fused_search.cache_clear()


@pytest.mark.gpu
def test_on_a_gpu_it_equals_the_definition() -> None:
    _cases().main("cuda", [(1, 1, 1), (75, 150, 8), (1000, 4096, 32), (1000, 1024, 256), (4096, 16384, 8)])


@pytest.mark.gpu
def test_on_a_gpu_the_search_is_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, codebook = (F.normalize(torch.randn(rows, 8, device="cuda")) for rows in (5000, 16384))
    expected = nearest_code_in_blocks(vectors.double(), codebook.double())
    monkeypatch.setattr(lookup, "nearest_code_in_blocks", None)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert torch.equal(nearest_code(vectors, codebook), expected)
    assert torch.cuda.max_memory_allocated() - before < len(vectors) * len(codebook) * 4 / 10
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.equal(nearest_code(vectors, codebook), expected)
