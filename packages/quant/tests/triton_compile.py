"""Run by test_triton_lookup.py in a process of its own: the kernel is compiled for a GPU, on a machine without one.

The interpreter takes what the compiler refuses. The launch ends once the machine code is there, so that what the search
gives is no result.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from smalti.quant.triton_lookup import nearest_code_fused


class _NoDriver:
    """A driver that names a GPU of compute capability 8.6 and does no more."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 86, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def main(widths: list[int]) -> list[int]:
    """The bytes of shared memory that a program takes, by width."""
    shared = []

    def launch(kernel: JITFunction, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*args: Any, **settings: Any) -> None:
            code = kernel.warmup(*args, grid=grid, **settings)
            assert code.asm["cubin"]
            shared.append(code.metadata.shared)

        return run

    driver.set_active(_NoDriver())
    with mock.patch.object(JITFunction, "__getitem__", launch):
        for width in widths:
            nearest_code_fused(torch.ones(3, width), torch.ones(5, width))
    return shared


if __name__ == "__main__":
    print(*main([int(width) for width in sys.argv[1:]]))
