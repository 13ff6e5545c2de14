"""How codes follow their tokens outside of the backward pass: first batch, averages, revival, anchors, affine moments.

Legend: N tokens of this process, K codes, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.core.distributed import all_reduce_sum
from smalti.quant.affine import AffineCodebook
from smalti.quant.anchors import Anchors
from smalti.quant.ema import EmaStatistics
from smalti.quant.inputs import float32_or_wider
from smalti.quant.revival import Revival, initialise_by_data, revive

if TYPE_CHECKING:
    from smalti.quant.vector import VectorQuantizerOptions


class Seen(NamedTuple):
    """What a forward pass saw: its tokens `(N, D)` with and without unit length, and the codes `(N,)` they got."""

    vectors: Tensor
    raw: Tensor
    tokens: Tensor


class CodebookLearning(nn.Module):
    """The statistics that `VectorQuantizerOptions` ask for; they write to the codebook at every training step.

    Args:
        options: of the quantizer.
        codebook: `(K, D)`, where averages start.
        unit: whether tokens and codes are of unit length.

    Attributes:
        ema: `EmaStatistics`, where `update` is `ema`.
        revival: `Revival`, where dead codes are revived.
        anchors: `Anchors`, where rarely used codes are pulled to tokens.
        affine: `AffineCodebook`, where codes are affine.
        initialised: whether the first batch was seen, where it makes the codes.
    """

    initialised: Tensor

    def __init__(self, options: VectorQuantizerOptions, codebook: Tensor, *, unit: bool) -> None:
        super().__init__()
        self.options = options
        self.unit = unit
        self.ema = EmaStatistics(codebook, options.ema_decay) if options.update == "ema" else None
        revives = options.revive_after is not None or options.revive_below is not None
        self.revival = Revival(len(codebook)) if revives else None
        self.anchors = Anchors(len(codebook), options.anchor_decay) if options.anchor_decay is not None else None
        self.affine = AffineCodebook(codebook.shape[1]) if options.affine else None
        if options.initialise == "data":
            self.register_buffer("initialised", torch.tensor(False))

    @torch.no_grad()
    def prepare(self, codebook: Tensor, vectors: Tensor) -> None:
        """Before the search for codes of the tokens `(N, D)`, so that new codes compete for what made them."""
        if self.options.initialise == "data":
            initialise_by_data(vectors, self.initialised, codebook, *self._statistics(), cosine=self.unit)
        if self.affine is not None:
            self.affine.observe(vectors, float32_or_wider(codebook))
        if self.revival is not None and self.options.revive_after is not None:
            self._revive(codebook, self.revival.unused >= self.options.revive_after, vectors, 1.0)

    @torch.no_grad()
    def learn(self, codebook: Tensor, seen: list[Seen]) -> None:
        """After the search: what a step returns are the codes from before it.

        Args:
            codebook: `(K, D)`, is written to.
            seen: of one or several forward passes.
        """
        options = self.options
        # A copy, since averages write to the codebook.
        searched = self._searched(codebook.detach().clone()) if self.anchors is not None else None
        if self.ema is not None:
            updates = [self.ema.update(one.tokens, self._inverse(one.vectors)) for one in seen]
            counts = torch.stack(updates).sum(0)
            codes = self.ema.codebook(smoothing=options.ema_smoothing)
            codes = codes if options.ema_smoothing else torch.where(counts[:, None] > 0, codes, codebook)
            codebook.copy_(F.normalize(codes, dim=-1, eps=1e-12) if self.unit else codes)
        elif self.revival is not None:
            every = torch.cat([one.tokens for one in seen])
            counts = all_reduce_sum(torch.bincount(every, minlength=len(codebook)))
        if self.revival is not None:
            self.revival.note(counts)
        if self.ema is not None and options.revive_below is not None:
            # At once, as the published models with such a threshold were trained.
            vectors = torch.cat([one.vectors for one in seen])
            self._revive(codebook, self.ema.counts < options.revive_below, vectors, options.revive_below)
        if self.anchors is not None and searched is not None:
            vectors, raw, tokens = (torch.cat(part) for part in zip(*seen, strict=True))
            self.anchors.update(codebook, tokens, self._searched(vectors), searched, raw)

    def _searched(self, vectors: Tensor) -> Tensor:
        """Tokens or codes as a search by cosine sees them."""
        return F.normalize(vectors, dim=-1, eps=1e-12) if self.options.cosine else vectors

    def _revive(self, codebook: Tensor, dead: Tensor, vectors: Tensor, seen: float) -> None:
        assert self.revival is not None
        revival, vectors = self.revival, self._inverse(vectors)
        revive(dead, vectors, revival.step, revival.unused, codebook, *self._statistics(), seen)

    def _statistics(self) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if self.ema is None else (self.ema.counts, self.ema.sums)

    def _inverse(self, vectors: Tensor) -> Tensor:
        return vectors if self.affine is None else self.affine.inverse(vectors)
