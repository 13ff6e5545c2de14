"""Arrays in files of NumPy, of which strangers may have written every byte."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray


def parse_array(content: bytes) -> NDArray[Any]:
    """The array in the bytes of a `.npy` file; whatever is wrong with them is a `ValueError`.

    NumPy parses the header as Python source, so that broken bytes raise errors of many types. Objects are refused.
    """
    try:
        array: NDArray[Any] = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except Exception as error:
        raise ValueError(" ".join(str(error).split())[:200] or type(error).__name__) from error
    if not array.dtype.itemsize:  # of these any number fits into no bytes
        raise ValueError(f"its elements are {array.dtype}, which has no size")
    return array
