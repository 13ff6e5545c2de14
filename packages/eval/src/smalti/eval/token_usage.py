"""How evenly a tokenizer uses its codebooks, from the tokens of a set of images.

Legend: B batch, L token positions, S streams, K codes of a stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

USAGE_DEFINITION = "share of the codes that occur at least once among the tokens of the images; mean over streams"
PERPLEXITY_DEFINITION = (
    "exp of the entropy (natural logarithm) of the code frequencies over all tokens of the images; mean over streams"
)


class TokenUsage:
    """Counts how often each code occurs.

    Args:
        vocab: K of each stream.

    Attributes:
        counts: int64 `(K,)` of each stream.
    """

    def __init__(self, vocab: tuple[int, ...]) -> None:
        self.counts = [torch.zeros(size, dtype=torch.int64) for size in vocab]

    def update(self, tokens: Tensor) -> None:
        """Count tokens `(B, L, S)`."""
        for counts, codes in zip(self.counts, tokens.unbind(-1), strict=True):
            counts.add_(torch.bincount(codes.flatten().cpu(), minlength=len(counts)))

    @property
    def usage(self) -> list[float]:
        """Share of the codes of each stream that occurred, in [0, 1]."""
        return [float((counts > 0).double().mean()) for counts in self.counts]

    @property
    def perplexity(self) -> list[float]:
        """Exp of the entropy of each stream, from 1 (one code) to K (all equally often)."""
        frequencies = [counts.double() / counts.sum() for counts in self.counts]
        return [float(torch.special.entr(values).sum().exp()) for values in frequencies]
