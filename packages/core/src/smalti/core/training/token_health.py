"""What training tells about the tokens of a tokenizer: usage of its codebooks, and a warning when it falls.

Legend: B batch, L token positions, S streams.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from smalti.core.codebook_health import QUEUE, CodebookHealth, CollapseWatch, code_distances
from smalti.core.contracts import Quantizer, Tokenizer

BATCHES_AT_ONCE = 64


class TokenHealth:
    """Codebook health over the latest tokens of a tokenizer in training.

    Args:
        tokenizer: its layout says which streams and scales there are; those of its `codebooks` are looked at. Where
            it has a `quantizer` with one latent position for each token position, distances between codes are told
            as well.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        layout = tokenizer.layout()
        scales = [math.prod(grid) for grid in layout.shape] if layout.kind == "scales" else []
        self.codebooks = tokenizer.codebooks
        self.health = CodebookHealth(layout.vocab[: self.codebooks], QUEUE, scales)
        self.watch = CollapseWatch(self.codebooks)
        quantizer = getattr(tokenizer, "quantizer", None)
        self.quantizer = quantizer if isinstance(quantizer, Quantizer) and layout.kind != "scales" else None
        self._pending: list[Tensor] = []
        self._kept: list[Tensor] = []

    def update(self, tokens: Tensor) -> None:
        """Take in the tokens `(B, L, S)` of a batch; they count when `keep` says so."""
        self._pending.append(tokens.detach()[..., : self.codebooks])

    def keep(self, *, good: bool = True) -> None:
        """Count the batches since the last call, or forget them where their update was skipped."""
        self._kept += self._pending if good else []
        self._pending = []
        if len(self._kept) >= BATCHES_AT_ONCE:
            self._count()

    def _count(self) -> None:
        """Count what was kept, many batches at once: a queue is long, and moving it takes a while."""
        for _, batches in groupby(self._kept, key=lambda tokens: tokens.shape[1:]):
            self.health.update(torch.cat([*batches]))
        self._kept = []

    def findings(self) -> dict[str, Any]:
        """Figures over the queues of all processes, which must all call it.

        Returns:
            `usage`, `perplexity`, `dead_codes`: a value per stream; `usage_of_scales`, per scale, where there
            are scales; `distances`, the quantiles of `code_distances` per stream, where they are known;
            `collapsed`, the streams whose usage has newly fallen below half of its best, if there are any.
        """
        self._count()
        found: dict[str, Any] = dict(self.health.result())
        if self.health.scales:
            found["usage_of_scales"] = [scale.result()["usage"] for scale in self.health.scales]
        if self.quantizer is not None:
            found["distances"] = code_distances(self.quantizer)
        collapsed = self.watch.check(found["usage"])
        return found | ({"collapsed": collapsed} if collapsed else {})

    def warning(self, findings: Mapping[str, Any], stage: str, step: int) -> str | None:
        """A sentence about the streams that collapsed at this step, None without any."""
        if "collapsed" not in findings:
            return None
        falls = ", ".join(
            f"stream {stream} from {self.watch.best[stream]:.1%} to {findings['usage'][stream]:.1%}"
            for stream in findings["collapsed"]
        )
        return f"{stage}: codebook collapse at step {step}: usage fell to less than half of its best ({falls})"

    def state_dict(self) -> dict[str, Any]:
        """What this process has seen."""
        self._count()
        return {"health": self.health.state_dict(), "watch": self.watch.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._pending, self._kept = [], []
        self.health.load_state_dict(state["health"])
        self.watch.load_state_dict(state["watch"])


def redistributed(states: Sequence[Mapping[str, Any]], rank: int, processes: int) -> dict[str, Any]:
    """The share of one of `processes` in the states of all processes of an earlier run, by rank."""
    return {
        "health": _dealt([state["health"] for state in states], rank, processes),
        "watch": dict(states[0]["watch"]),  # all processes watch the same figures
    }


def _dealt(states: Sequence[Mapping[str, Any]], rank: int, processes: int) -> dict[str, Any]:
    """Histograms go to the first process; the latest tokens are dealt out in turn, as batches are."""
    histograms = [torch.stack(found).sum(0) for found in zip(*(state["histograms"] for state in states), strict=True)]
    latest = [_in_turn(found)[rank::processes] for found in zip(*(state["latest"] for state in states), strict=True)]
    scales = zip(*(state["scales"] for state in states), strict=True)
    return {
        "histograms": histograms if rank == 0 else [torch.zeros_like(histogram) for histogram in histograms],
        "latest": latest,
        "scales": [_dealt(found, rank, processes) for found in scales],
    }


def _in_turn(queues: Sequence[Tensor]) -> Tensor:
    """The tokens of several queues, oldest first, one of each in turn."""
    places = torch.cat([torch.arange(len(queue)) - len(queue) for queue in queues])
    return torch.cat(list(queues))[places.argsort(stable=True)]
