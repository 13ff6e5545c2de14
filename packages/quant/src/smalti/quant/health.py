"""Codebook health: how much of each stream's codebook the tokens use.

Legend: B batch, L token positions, S streams, K codes of a stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from smalti.core.distributed import all_reduce_sum
from smalti.core.errors import UserError
from smalti.quant.inputs import check_tokens


class CodebookHealth:
    """Streaming token histograms, one per stream, over everything or over the latest tokens.

    Args:
        vocab: K of each stream.
        queue: look only at so many of the latest positions that this process saw; None looks at all.
    """

    def __init__(self, vocab: Sequence[int], queue: int | None = None) -> None:
        if queue is not None and queue < 1:
            raise UserError(f"a queue of tokens holds at least one, got {queue}")
        self.vocab = tuple(vocab)
        self.queue = queue
        self._histograms = [torch.zeros(size, dtype=torch.int64) for size in self.vocab]
        self._latest = torch.zeros(0, len(self.vocab), dtype=torch.int64)

    def update(self, tokens: Tensor) -> None:
        """Take in tokens, int64 `(B, L, S)`.

        Raises:
            UserError: another shape or type, tokens out of range.
        """
        check_tokens(tokens, self.vocab)
        flat = tokens.detach().reshape(-1, len(self.vocab))
        if self.queue is None:
            self._histograms = [
                histogram.to(flat.device) + counts
                for histogram, counts in zip(self._histograms, self._counted(flat), strict=True)
            ]
        else:
            self._latest = torch.cat([self._latest.to(flat.device), flat])[-self.queue :]

    def _counted(self, flat: Tensor) -> list[Tensor]:
        return [torch.bincount(flat[:, stream], minlength=size) for stream, size in enumerate(self.vocab)]

    def result(self) -> dict[str, list[float]]:
        """Figures over the tokens of all processes, a list with one value per stream; every process must call it.

        Returns:
            `usage`, the share of codes seen, 0 to 1; `perplexity`, exp of the entropy of the histogram, 1 to K;
            `dead_codes`, the number of codes not seen.

        Raises:
            UserError: no tokens yet.
        """
        own = self._histograms if self.queue is None else self._counted(self._latest)
        figures: dict[str, list[float]] = {"usage": [], "perplexity": [], "dead_codes": []}
        for histogram in own:
            total = all_reduce_sum(histogram.clone()).double().cpu()
            if not total.any():
                raise UserError("codebook health has seen no tokens: call update(tokens) before result()")
            share = total[total > 0] / total.sum()
            figures["usage"].append(len(share) / len(total))
            figures["perplexity"].append(float((-(share * share.log()).sum()).exp()))
            figures["dead_codes"].append(float(len(total) - len(share)))
        return figures
