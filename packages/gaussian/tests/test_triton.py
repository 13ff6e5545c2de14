"""The Triton kernels: interpreted on the CPU everywhere, compiled without a GPU, and run where there is one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from smalti.core.errors import UserError
from smalti.gaussian import rasterize_gaussians_2d
from smalti.gaussian.attention import deformable as deformable_attention
from smalti.gaussian.attention.deformable import multi_scale_deformable_attention
from smalti.gaussian.attention.module import DeformableAttention

pytest.importorskip("triton", reason="Triton is made for Linux only")
HERE = Path(__file__).parent


def _cases() -> ModuleType:
    spec = importlib.util.spec_from_file_location("triton_cases", HERE / "triton_cases.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(script: str, **variables: str) -> str:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run([sys.executable, HERE / script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_interpreted_they_equal_the_references() -> None:
    assert _run("triton_cases.py", TRITON_INTERPRET="1") == "all equal\n"


@pytest.mark.slow
def test_they_compile_without_a_gpu(tmp_path: Path) -> None:
    compiled = _run("triton_compile.py", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert compiled.split() == ["_backward", "_collect", "_differentiate", "_draw", "_forward"]


def test_without_a_gpu_the_backend_says_so(random_gaussians) -> None:
    with pytest.raises(UserError, match=r"^backend 'triton' runs on a CUDA device, but the Gaussians are on cpu$"):
        rasterize_gaussians_2d(*random_gaussians().values(), 8, 8, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("compositing", ["sum", "over"])
def test_on_a_gpu_the_rasterizer_equals_the_reference(compositing: str, dtype: torch.dtype) -> None:
    check = _cases().check_rasterizer
    for size in ((1, 256, 3, 256, 256), (3, 64, 64, 33, 47), (2, 300, 1, 100, 200), (1, 256, 8, 32, 32)):
        for cut in (True, False):
            check(size, dtype, "cuda", compositing, 12.0, cut=cut)
    check((1, 1, 1, 1, 1), dtype, "cuda", compositing, 12.0, cut=True)


@pytest.mark.gpu
def test_on_a_gpu_a_large_picture_equals_that_of_the_tiles() -> None:
    inputs = _cases().gaussians(1, 10_000, 3, torch.float32, "cuda", 12.0)
    expected = rasterize_gaussians_2d(*inputs, 2160, 3840, backend="tiles")
    got = rasterize_gaussians_2d(*inputs, 2160, 3840)
    assert (got - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_on_a_gpu_the_attention_equals_the_reference(dtype: torch.dtype) -> None:
    check = _cases().check_attention
    check((8, 256, 4, 16, 5), [(32, 32)], dtype, "cuda")
    check((4, 1024, 8, 32, 4), [(32, 32), (16, 16)], dtype, "cuda")
    check((2, 900, 8, 32, 4), [(64, 64), (32, 32), (16, 16), (8, 8)], dtype, "cuda")
    check((1, 7, 3, 100, 3), [(1, 5), (3, 1), (1, 1)], dtype, "cuda")
    _cases().check_operator("cuda")


@pytest.mark.gpu
def test_on_a_gpu_the_attention_is_the_kernel_and_gives_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deformable_attention, "sample_grids", None)
    torch.manual_seed(0)
    module = DeformableAttention(64, levels=2).cuda()
    query, references = torch.randn(2, 256, 64, device="cuda"), torch.rand(2, 256, 2, device="cuda")
    source = torch.randn(2, 32 * 32 + 16 * 16, 64, device="cuda", requires_grad=True)

    def run() -> tuple[torch.Tensor, ...]:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            output = module(query, references, source, [(32, 32), (16, 16)])
        assert output.dtype == torch.float32
        return output, *torch.autograd.grad(output.square().sum(), (source, *module.parameters()))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.gpu
def test_on_a_gpu_the_attention_can_be_captured() -> None:
    inputs = _cases().attention((2, 64, 4, 16, 4), [(16, 16)], torch.float32, "cuda")
    expected = multi_scale_deformable_attention(inputs[0], [(16, 16)], *inputs[1:])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = multi_scale_deformable_attention(inputs[0], [(16, 16)], *inputs[1:])
    graph.replay()
    torch.testing.assert_close(output, expected)
