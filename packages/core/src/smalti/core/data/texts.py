"""Texts of images: captions, or features of captions that were made beforehand.

Legend: M tokens of a text, T width of the features of one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from smalti.core.data.array_file import parse_array
from smalti.core.data.dataset import FilePart, Record
from smalti.core.errors import UserError

Text = str | NDArray[np.float32] | None
NUMPY = b"\x93NUMPY"


def is_features(content: bytes) -> bool:
    """Whether a text's bytes are those of an array."""
    return content.startswith(NUMPY)


def text_of(record: Record) -> Text:
    """A record's caption, or its features `(M, T)` in float32; None without.

    Raises:
        UserError: neither UTF-8 nor an array of numbers.
    """
    content = record.text_bytes
    if content is None:
        return None
    try:
        if is_features(content):
            array = parse_array(content)
            if array.dtype.kind == "c":
                raise ValueError(f"its numbers are {array.dtype}")
            with np.errstate(over="raise", invalid="raise"):
                features: NDArray[np.float32] = array.astype(np.float32)
            return features
        return content.decode().strip()
    except (ValueError, TypeError, FloatingPointError) as error:  # no numbers, or none of float32
        place = f" in {record.text.path}" if isinstance(record.text, FilePart) else ""
        raise UserError(f"the text of image {record.key!r}{place} is damaged: {error}") from None
