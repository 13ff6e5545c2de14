"""Codebook health: how much of its codebooks a tokenizer uses, and how far its codes lie apart.

Legend: B batch, L token positions, S streams, K codes of a stream, D latent width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from smalti.core.contracts import Quantizer, check_tokens
from smalti.core.distributed import all_reduce_sum, gather_objects
from smalti.core.errors import UserError

# Tokens of a queue, as LlamaGen, FQGAN and XQ-GAN look at them.
QUEUE = 65536
# Beyond so many codes the tokens of a queue are compared with each other and not counted in a table.
LARGEST_HISTOGRAM = 1 << 24
USAGE_DEFINITION = "share of the codes that occur at least once among the tokens of the images; mean over streams"
PERPLEXITY_DEFINITION = (
    "exp of the entropy (natural logarithm) of the code frequencies over all tokens of the images; mean over streams"
)
Figures = dict[str, list[float]]


class CodebookHealth:
    """Streaming token histograms, one per stream, over everything or over the latest tokens.

    Args:
        vocab: K of each stream.
        queue: look only at so many of the latest tokens of a stream that this process saw; None looks at all.
        scales: numbers of positions that follow one another in an image and are looked at separately as well,
            each with a queue of its own: those of the grids of a layout of scales.
    """

    def __init__(self, vocab: Sequence[int], queue: int | None = None, scales: Sequence[int] = ()) -> None:
        if queue is not None and queue < 1:
            raise UserError(f"a queue of tokens holds at least one, got {queue}")
        if queue is None and max(vocab) > LARGEST_HISTOGRAM:
            raise UserError(f"a histogram of {max(vocab)} codes is too large: give a queue of tokens to look at")
        self.vocab = tuple(vocab)
        self.queue = queue
        self.lengths = tuple(scales)
        self._histograms = [torch.zeros(size, dtype=torch.int64) for size in self.vocab] if queue is None else []
        self._latest = [torch.zeros(0, dtype=torch.int64) for _ in self.vocab]
        self.scales = [CodebookHealth(vocab, queue) for _ in self.lengths]

    def update(self, tokens: Tensor) -> None:
        """Take in tokens, int64 `(B, L, S)`, or those of the first streams, where dropout left out the others.

        Raises:
            UserError: another shape or type, tokens out of range, positions that are not those of the scales.
        """
        check_tokens(tokens, self.vocab[: max(tokens.shape[-1], 1)])
        if self.scales and tokens.shape[1] != sum(self.lengths):
            raise UserError(
                f"scales of {self.lengths} positions have {sum(self.lengths)} tokens, got {tokens.shape[1]}"
            )
        for stream, codes in enumerate(tokens.detach().unbind(2)):
            flat = codes.flatten()
            if self.queue is None:
                self._histograms[stream] = self._histograms[stream].to(flat.device) + self._counted(flat, stream)
            else:
                self._latest[stream] = torch.cat([self._latest[stream].to(flat.device), flat])[-self.queue :]
        if self.scales:
            for scale, part in zip(self.scales, tokens.split(self.lengths, dim=1), strict=True):
                scale.update(part)

    def _counted(self, codes: Tensor, stream: int) -> Tensor:
        return torch.bincount(codes, minlength=self.vocab[stream])

    def _count(self, stream: int) -> Tensor:
        return self._histograms[stream] if self.queue is None else self._counted(self._latest[stream], stream)

    @property
    def counts(self) -> list[Tensor]:
        """How often this process saw each code: int64 `(K,)` of each stream."""
        return [self._count(stream) for stream in range(len(self.vocab))]

    def result(self) -> Figures:
        """`figures_of` the tokens of all processes; every process must call it."""
        return _figures([self._occurrences(stream) for stream in range(len(self.vocab))], self.vocab)

    def _occurrences(self, stream: int) -> Tensor:
        """How often each of the codes occurs that do occur, over all processes."""
        if self.vocab[stream] <= LARGEST_HISTOGRAM:
            return _present(all_reduce_sum(self._count(stream).clone()))
        codes = torch.cat(gather_objects(self._latest[stream].cpu()))
        counts: Tensor = codes.unique(return_counts=True)[1]
        return counts

    def state_dict(self) -> dict[str, Any]:
        """What it has seen, to go on from."""
        return {
            "histograms": [histogram.cpu() for histogram in self._histograms],
            "latest": [codes.cpu() for codes in self._latest],
            "scales": [scale.state_dict() for scale in self.scales],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self._histograms, self._latest = list(state["histograms"]), list(state["latest"])
        for scale, part in zip(self.scales, state["scales"], strict=True):
            scale.load_state_dict(part)


def figures_of(counts: Sequence[Tensor]) -> Figures:
    """What histograms say, a list with one value per stream.

    Args:
        counts: int64 `(K,)` of each stream, how often each code occurs.

    Returns:
        `usage`, the share of codes that occur, 0 to 1; `perplexity`, exp of the entropy of the histogram, 1 to
        K; `dead_codes`, the number of codes that do not occur. A stream without tokens has usage and
        perplexity 0.

    Raises:
        UserError: no tokens in any stream.
    """
    return _figures([_present(histogram) for histogram in counts], [len(histogram) for histogram in counts])


def _present(histogram: Tensor) -> Tensor:
    return histogram[histogram > 0]


def _figures(occurrences: Sequence[Tensor], vocab: Sequence[int]) -> Figures:
    if not any(map(len, occurrences)):
        raise UserError("codebook health has seen no tokens: call update(tokens) before result()")
    shares = [counts.double().cpu() / counts.sum().cpu() for counts in occurrences]
    return {
        "usage": [len(share) / size for share, size in zip(shares, vocab, strict=True)],
        "perplexity": [float(torch.special.entr(share).sum().exp()) if len(share) else 0.0 for share in shares],
        "dead_codes": [float(size - len(share)) for share, size in zip(shares, vocab, strict=True)],
    }


class CollapseWatch:
    """Notices, once per stream, that usage fell below half of the best it has been.

    Args:
        streams: S.
    """

    def __init__(self, streams: int) -> None:
        self.best = [0.0] * streams
        self.collapsed = [False] * streams

    def check(self, usage: Sequence[float]) -> list[int]:
        """The streams that collapsed since the last call, by the usage `(S,)` of now."""
        self.best = [max(pair) for pair in zip(self.best, usage, strict=True)]
        fallen = [value < best / 2 for value, best in zip(usage, self.best, strict=True)]
        found = [stream for stream, fell in enumerate(fallen) if fell and not self.collapsed[stream]]
        for stream in found:
            self.collapsed[stream] = True
        return found

    def state_dict(self) -> dict[str, Any]:
        """What it remembers."""
        return {"best": list(self.best), "collapsed": list(self.collapsed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.best, self.collapsed = list(state["best"]), list(state["collapsed"])


DISTANCE_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
_LARGEST, _SAMPLE, _BLOCK = 1 << 20, 1024, 1 << 20


@torch.no_grad()
def code_distances(quantizer: Quantizer) -> list[list[float]]:
    """The spectrum of distances from a code to the nearest other code, for each stream.

    Codes that run together lie at the low end. The codes of a stream are the latents of one position whose
    tokens differ in this stream alone; a sum or a product of streams adds the same to all of them.

    Args:
        quantizer: its latent has one position for each token position.

    Returns:
        For each stream the quantiles `DISTANCE_QUANTILES` over at most 1,024 codes, evenly spread over the indices;
        nothing for a stream of more than 2^20 codes, which nobody learns one by one.
    """
    device = next((tensor.device for tensor in (*quantizer.parameters(), *quantizer.buffers())), None)
    spectra: list[list[float]] = []
    for stream, size in enumerate(quantizer.vocab):
        if size > _LARGEST:
            spectra.append([])
            continue
        tokens = torch.zeros(size, 1, len(quantizer.vocab), dtype=torch.int64, device=device)
        tokens[:, 0, stream] = torch.arange(size, device=device)
        codes = quantizer.decode(tokens, (1,)).reshape(size, -1).float()
        chosen = torch.linspace(0, size - 1, min(size, _SAMPLE), device=device).long()
        lengths = codes.square().sum(1).mul_(-0.5)
        nearest = torch.cat([_nearest_other(codes, lengths, some) for some in chosen.split(max(1, _BLOCK // size))])
        # By a product first, which is quick but rounds, then by the difference: codes that almost coincide count.
        distances = (codes[chosen] - codes[nearest]).norm(dim=1)
        spectra.append(distances.quantile(torch.tensor(DISTANCE_QUANTILES, device=device)).tolist())
    return spectra


def _nearest_other(codes: Tensor, lengths: Tensor, chosen: Tensor) -> Tensor:
    """The index `(n,)` of the code that is nearest to each of those with indices `chosen` `(n,)`, itself left out.

    `lengths` are the codes' squared lengths times -0.5.
    """
    scores = torch.addmm(lengths, codes[chosen], codes.t())
    return scores.scatter_(1, chosen[:, None], float("-inf")).argmax(1)
