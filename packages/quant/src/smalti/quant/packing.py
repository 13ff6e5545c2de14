"""One token out of several digits, and back: a number with a base of its own at every place.

Legend: B batch, L token positions, d digits of a token, n levels (values) of a digit.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from smalti.quant.inputs import as_tokens, check_token_space


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


class Packing(nn.Module):
    """Packs digits with the same levels again and again; its numbers follow the device and are not saved.

    Args:
        levels: n of every digit.
    """

    levels: Tensor
    places: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.vocab = (math.prod(levels),)
        # Integers, so that they stay exact where the module is converted to another type.
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("places", torch.tensor(place_values(levels)), persistent=False)

    def pack(self, digits: Tensor) -> Tensor:
        """Digits, int64 `(B, *space, d)`, to tokens `(B, L, 1)`."""
        return as_tokens(pack_digits(digits, self.places), digits)

    def unpack(self, tokens: Tensor, space: tuple[int, ...]) -> Tensor:
        """Tokens `(B, L, 1)` to digits, int64 `(B, *space, d)`.

        Raises:
            UserError: tokens of another shape or type, out of range, or that do not fill `space`.
        """
        check_token_space(tokens, space, self.vocab)
        return unpack_digits(tokens.view(len(tokens), *space), self.places, self.levels)
