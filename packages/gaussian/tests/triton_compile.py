"""Run by test_triton.py in a process of its own: every kernel is compiled for a GPU, on a machine without one.

The interpreter takes what the compiler refuses. Here launches end once the machine code is there, so that what the
functions give is no result.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from smalti.gaussian.attention import triton_kernels as triton_deformable_attention
from smalti.gaussian.rasterizer import triton_backend
from smalti.gaussian.rasterizer.backends import Splats, View


class _NoDriver:
    """A driver that names a GPU of compute capability 9.0 and does no more."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main() -> set[str]:
    compiled = set()

    def launch(kernel: JITFunction, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*args: Any, **settings: Any) -> None:
            code = kernel.warmup(*args, grid=grid, **settings)
            assert code.asm["cubin"]
            compiled.add(kernel.fn.__name__)

        return run

    driver.set_active(_NoDriver())
    with (
        mock.patch.object(JITFunction, "__getitem__", launch),
        mock.patch.object(triton_backend, "_check_device"),
    ):
        for over, channels in ((False, 3), (True, 1)):
            boxes = torch.tensor([0, 32, 0, 32]).expand(1, 2, 4).contiguous()
            splats = Splats(
                torch.full((1, 2, 2), 9.0), torch.ones(1, 2, 3), torch.ones(1, 2, channels), torch.ones(1, 2), boxes
            )
            view = View(17, 32, 0.0, 1 / 255, over)
            image = torch.zeros_like(triton_backend.forward(splats, view))
            triton_backend.backward(splats, view, image, image)
        value, locations, weights = torch.ones(1, 6, 2, 16), torch.ones(1, 3, 2, 1, 2, 2), torch.ones(1, 3, 2, 1, 2)
        output = triton_deformable_attention._sample(value, [2, 3], locations, weights)
        triton_deformable_attention._sample_backward(output, value, [2, 3], locations, weights)
    return compiled


if __name__ == "__main__":
    print(*sorted(main()), file=sys.stdout)
