"""Token layouts: what the tokens of one image look like.

Legend: h w latent grid, L positions, S streams (parallel codes at one position), K codes of a stream.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, model_validator


class TokenLayout(BaseModel):
    """The shape and the vocabulary of an image's tokens, an int64 tensor `(B, L, S)`.

    `kind` says how the L positions are ordered: `"grid"`, rows of one h x w grid; `"sequence"`, no place in
    the image; `"scales"`, grids from coarse to fine, one after the other. `shape` lists the grids (for a
    sequence, `((L,),)`). `vocab` has one codebook size per stream: sub-codes of a factorized codebook,
    branches of a product, levels of a residual stack.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["grid", "sequence", "scales"]
    shape: tuple[tuple[int, ...], ...]
    vocab: tuple[int, ...]

    @model_validator(mode="after")
    def _consistent(self) -> TokenLayout:
        axes = 1 if self.kind == "sequence" else 2
        if not self.shape or (self.kind != "scales" and len(self.shape) != 1):
            raise ValueError(f"a {self.kind} layout has {'grids' if self.kind == 'scales' else 'one shape'}")
        if any(len(grid) != axes or min(grid) < 1 for grid in self.shape):
            raise ValueError(f"a {self.kind} layout needs shapes of {axes} positive sizes, got {self.shape}")
        if not self.vocab or min(self.vocab) < 2:
            raise ValueError(f"every stream needs a codebook of 2 codes or more, got {self.vocab}")
        return self

    @classmethod
    def grid(cls, height: int, width: int, vocab: tuple[int, ...]) -> TokenLayout:
        """Rows of one grid, `L = height * width`."""
        return cls(kind="grid", shape=((height, width),), vocab=vocab)

    @classmethod
    def sequence(cls, length: int, vocab: tuple[int, ...]) -> TokenLayout:
        """`L = length` latent tokens without a place in the image (1-D tokenizers)."""
        return cls(kind="sequence", shape=((length,),), vocab=vocab)

    @classmethod
    def scales(cls, grids: tuple[tuple[int, int], ...], vocab: tuple[int, ...]) -> TokenLayout:
        """Grids from coarse to fine (VAR), `L` the sum of their areas."""
        return cls(kind="scales", shape=grids, vocab=vocab)

    @property
    def positions(self) -> int:
        """L, the number of token positions of one image."""
        return sum(math.prod(grid) for grid in self.shape)

    @property
    def streams(self) -> int:
        """S, the number of parallel codes at one position."""
        return len(self.vocab)

    @property
    def bits(self) -> float:
        """Size of one image in bits when every code is equally likely: L * sum of log2 K."""
        return self.positions * sum(math.log2(size) for size in self.vocab)

    def __str__(self) -> str:
        """For sentences: `grid 8x8, 1 stream of 512 codes`."""
        shape = ", ".join("x".join(map(str, grid)) for grid in self.shape)
        sizes = " and ".join(map(str, dict.fromkeys(self.vocab)))
        return f"{self.kind} {shape}, {self.streams} stream{'s' if self.streams > 1 else ''} of {sizes} codes"
