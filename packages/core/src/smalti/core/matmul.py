"""Matrix products in float32: all of its bits, and on a CPU by oneDNN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch


@contextmanager
def true_float32() -> Iterator[None]:
    """Undo `torch.set_float32_matmul_precision` for a while: what is decided by a hair must not depend on it."""
    settings: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    both = [(setting, setting.fp32_precision) for setting in settings]
    changed = [(setting, value) for setting, value in both if value not in ("none", "ieee")]
    for setting, _ in changed:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        for setting, value in changed:
            setting.fp32_precision = value


@cache
def has_packed_products() -> bool:
    """Whether torch offers oneDNN's products with weights in its own order, up to twice as fast as others.

    The operators are private to torch, which may rename or drop them.
    """
    names = ("_reorder_linear_weight", "_linear_pointwise", "data_ptr", "_nbytes")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)
