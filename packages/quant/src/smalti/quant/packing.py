"""One token out of several digits, and back: a number with a base of its own at every place.

Legend: d digits of a token, n levels (values) of a digit.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from torch import Tensor


def _fits(levels: tuple[int, ...]) -> tuple[int, ...]:
    if math.prod(levels) >= 2**63:
        raise ValueError(f"{math.prod(levels)} codes do not fit into a token of 64 bits, use a product of quantizers")
    return levels


Levels = Annotated[tuple[Annotated[int, Field(ge=2)], ...], Field(min_length=1), AfterValidator(_fits)]
"""The n of every digit, as an option."""


def place_values(levels: Sequence[int]) -> list[int]:
    """What a step of every digit is worth: 1, n_0, n_0 n_1, ...; the first digit is the least significant one."""
    return list(itertools.accumulate(levels[:-1], operator.mul, initial=1))


def pack_digits(digits: Tensor, places: Tensor) -> Tensor:
    """Digits, int64 `(..., d)`, to tokens, int64 `(...)`.

    Args:
        digits: every one in `[0, n)`.
        places: int64 `(d,)`, see `place_values`.
    """
    return (digits * places).sum(-1)


def unpack_digits(tokens: Tensor, places: Tensor, levels: Tensor | int) -> Tensor:
    """The inverse of `pack_digits`: tokens, int64 `(...)`, to digits, int64 `(..., d)`.

    Args:
        tokens: every one in `[0, product of the levels)`.
        places: int64 `(d,)`.
        levels: int64 `(d,)`, or one number for all.
    """
    return torch.div(tokens[..., None], places, rounding_mode="floor") % levels
