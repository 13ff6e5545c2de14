"""Memory in pages of 2 MiB where the system has them: a processor that reads gigabytes in a row waits for addresses.

Linux gives such pages to those who ask (`madvise`). Elsewhere, and where they are turned off, nothing happens.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

SIZE = 1 << 21
COLLAPSE = 25  # MADV_COLLAPSE: move what is there already into huge pages (Linux 6.1)
USE = 14  # MADV_HUGEPAGE: take huge pages at the first touch


def ask_for_huge_pages(address: int, length: int, advice: int) -> None:
    """Ask for huge pages under these bytes; those that hold the first and the last lie partly outside.

    Args:
        address: of the first byte.
        length: in bytes; below `SIZE` nothing happens.
        advice: `COLLAPSE` or `USE`.
    """
    madvise = _madvise()
    if madvise is not None and length >= SIZE:
        start, end = address // SIZE * SIZE, -(-(address + length) // SIZE) * SIZE
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), advice)  # advice may be refused


@cache
def _madvise() -> Any:
    try:
        return ctypes.CDLL(None).madvise
    except (OSError, TypeError, AttributeError):  # no such function here, or no C library to look in
        return None
