"""What the tokens of images say of a tokenizer: how it uses its codes, and how many bits an image takes.

Legend: B batch, L token positions, S streams, K codes of a stream.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from smalti.core.codebook_health import LARGEST_HISTOGRAM, figures_of
from smalti.core.contracts import check_tokens
from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout

ENTROPY_DEFINITION = "entropy in bits of the code frequencies over all tokens of the images, for each stream"
BITS_DEFINITION = (
    "bits of an image: log2 of the codebook size for every token, and what is sent beside tokens (side information)"
)
ENTROPY_BITS_DEFINITION = (
    "bits of an image if every token took the entropy of its stream (and scale), and what is sent beside tokens"
)


@dataclass(frozen=True)
class CodeFigures:
    """Figures of codes, a value for each stream.

    Attributes:
        usage: share of the codes that occur, 0 to 1.
        perplexity: exp of the entropy, 1 to K.
        entropy: bits, 0 to log2 K.
    """

    usage: list[float]
    perplexity: list[float]
    entropy: list[float]


@dataclass(frozen=True)
class TokenFigures(CodeFigures):
    """The same over all positions, and bits.

    Attributes:
        by_scale: figures of each scale; empty unless the layout is one of scales.
        counts: how often each code of a stream occurs, K numbers.
        bits: of an image, when every code takes log2 K bits, with side information.
        entropy_bits: of an image, when codes take the entropy of their stream and scale, with side information.
        side_bits: side information alone.
    """

    by_scale: list[CodeFigures]
    counts: list[list[int]]
    bits: float
    entropy_bits: float
    side_bits: float


class TokenStatistics:
    """Counts the codes of images, per stream and scale.

    Counts of processes add up exactly, in any order.

    Args:
        layout: of the tokens.
        side_bits: bits of an image that a decoder needs beside the tokens, such as positions of Gaussians that are
            not quantized (32 for every float32), or a caption. Comparisons by tokens alone leave them out.

    Raises:
        UserError: negative side information, or codebooks too large to be counted.
    """

    def __init__(self, layout: TokenLayout, side_bits: float = 0.0) -> None:
        if not 0 <= side_bits < math.inf:
            raise UserError(f"side information takes 0 bits or more, got {side_bits}")
        if max(layout.vocab) > LARGEST_HISTOGRAM:
            raise UserError(f"a histogram of {max(layout.vocab)} codes is too large to count")
        self.layout, self.side_bits = layout, side_bits
        self.lengths = [math.prod(grid) for grid in layout.shape]
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.images = 0
        self.counts = [[torch.zeros(size, dtype=torch.int64) for size in self.layout.vocab] for _ in self.lengths]

    def update(self, tokens: Tensor) -> Self:
        """Take in tokens, int64 `(B, L, S)`.

        Raises:
            UserError: another shape or type, or tokens out of range.
        """
        check_tokens(tokens, self.layout.vocab)
        if tokens.shape[1] != self.layout.positions:
            raise UserError(
                f"images of the layout {self.layout} have {self.layout.positions} tokens, not {tokens.shape[1]}"
            )
        for counts, part in zip(self.counts, tokens.detach().split(self.lengths, dim=1), strict=True):
            for histogram, codes in zip(counts, part.unbind(2), strict=True):
                histogram.add_(torch.bincount(codes.flatten(), minlength=len(histogram)).cpu())
        self.images += len(tokens)
        return self

    def merge(self, other: Self) -> None:
        """Take in what another one has seen.

        Raises:
            UserError: it is for another layout.
        """
        if other.layout != self.layout:
            raise UserError(f"tokens of the layout {other.layout} do not go with those of {self.layout}")
        self.images += other.images
        for own, others in zip(self.counts, other.counts, strict=True):
            for histogram, added in zip(own, others, strict=True):
                histogram.add_(added)

    def compute(self) -> TokenFigures:
        """The figures of all tokens that this process saw.

        Raises:
            UserError: it saw none.
        """
        if not self.images:
            raise UserError("there are no tokens yet: call update(tokens) first")
        counts = [torch.stack(histograms).sum(0) for histograms in zip(*self.counts, strict=True)]
        total = _figures(counts)
        by_scale = [_figures(counts) for counts in self.counts]
        coded = sum(length * sum(scale.entropy) for length, scale in zip(self.lengths, by_scale, strict=True))
        return TokenFigures(
            usage=total.usage,
            perplexity=total.perplexity,
            entropy=total.entropy,
            by_scale=by_scale if self.layout.kind == "scales" else [],
            counts=[histogram.tolist() for histogram in counts],
            bits=self.layout.bits + self.side_bits,
            entropy_bits=coded + self.side_bits,
            side_bits=self.side_bits,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """All it has seen: `images`, and the counts `SCALE.STREAM` `(K,)`."""
        counts = {
            f"{scale}.{stream}": histogram
            for scale, histograms in enumerate(self.counts)
            for stream, histogram in enumerate(histograms)
        }
        return {"images": torch.tensor(self.images), **counts}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        self.images = int(state["images"])
        self.counts = [
            [state[f"{scale}.{stream}"].cpu().clone() for stream in range(self.layout.streams)]
            for scale in range(len(self.lengths))
        ]


def _figures(counts: Sequence[Tensor]) -> CodeFigures:
    found = figures_of(counts)
    return CodeFigures(found["usage"], found["perplexity"], [math.log2(value) for value in found["perplexity"]])
