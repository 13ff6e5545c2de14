"""Arrays in files of NumPy, of which strangers may have written every byte."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout

Tokens = NDArray[np.integer[Any]]


@contextmanager
def parsed_header() -> Iterator[None]:
    """While NumPy parses a header, which it does as Python source: nobody is warned of what source that would be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def parse_array(content: bytes) -> NDArray[Any]:
    """The array in the bytes of a `.npy` file; whatever is wrong with them is a `ValueError`.

    Broken bytes in the header raise errors of many types. Objects are refused.
    """
    try:
        with parsed_header():
            array: NDArray[Any] = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except Exception as error:
        raise ValueError(" ".join(str(error).split())[:200] or type(error).__name__) from error
    if not array.dtype.itemsize:  # of these any number fits into no bytes
        raise ValueError(f"its elements are {array.dtype}, which has no size")
    return array


def array_bytes(array: NDArray[Any]) -> bytes:
    """The bytes of a `.npy` file, the same for the same array."""
    content = io.BytesIO()
    np.lib.format.write_array(content, np.ascontiguousarray(array), allow_pickle=False)
    return content.getvalue()


def check_stored_tokens(tokens: NDArray[Any], layout: TokenLayout, where: str) -> None:
    """Raise a `UserError` unless `tokens` are integers `(n, V, L, S)` within the codebooks of `layout`."""
    if not np.issubdtype(tokens.dtype, np.integer) or tokens.ndim != 4:
        raise UserError(f"{where} are {tokens.dtype} {tokens.shape}, expected integers (n, views, positions, streams)")
    if tokens.shape[2:] != (layout.positions, layout.streams):
        expected = (layout.positions, layout.streams)
        raise UserError(f"{where} have {tokens.shape[2:]} positions and streams, the layout has {expected}")
    outside = (tokens < 0) | (tokens >= np.array(layout.vocab, np.int64))
    if outside.any():
        stream = int(np.argwhere(outside)[0][-1])
        raise UserError(
            f"{where} hold the token {int(tokens[outside][0])} in stream {stream}: "
            f"its codebook has the codes 0 to {layout.vocab[stream] - 1}"
        )
