"""FAR: next-position prediction over several streams of tokens (FQGAN, Bai et al. 2024; Open-MAGVIT2, Luo et al. 2024).

A backbone makes one context of each position; a small transformer, the inner head, predicts its streams one after the
other from that context and the streams before.

Legend: B batch, L token positions, S streams, K codes of a stream, D width of the model, d width of a head.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from smalti.core.contracts import Generator, check_labels
from smalti.core.layout import TokenLayout
from smalti.core.sampling_settings import SamplingSettings
from smalti.generation.cache import Cache
from smalti.generation.checks import check_batch
from smalti.generation.conditions import ClassPrefix, dropped_labels
from smalti.generation.decoding import sample_one_by_one
from smalti.generation.llama import LlamaOptions
from smalti.generation.losses import stream_losses
from smalti.generation.norms import RMSNorm
from smalti.generation.sampling import TokenSampler
from smalti.generation.transformer import Transformer, initialise


class FAROptions(LlamaOptions):
    """Options of `FAR`; the defaults are FAR-B.

    Args:
        inner_layers: blocks of the inner head; `layers` are those of the backbone.
        aggregation: what the backbone sees of a position: `projection`, a linear layer over the embeddings of its
            streams, side by side (FAR); `sum`, their sum (Open-MAGVIT2).
        objective: `mean` of the streams' cross entropies (FAR), or their `sum` (Open-MAGVIT2).
    """

    name: Literal["far"] = "far"
    layers: Annotated[int, Field(ge=1)] = 24
    dim: Annotated[int, Field(ge=4)] = 1024
    heads: Annotated[int, Field(ge=1)] = 16
    inner_layers: Annotated[int, Field(ge=1)] = 3
    aggregation: Literal["projection", "sum"] = "projection"
    objective: Literal["mean", "sum"] = "mean"

    def supports(self, layout: TokenLayout) -> str | None:
        """Grids and sequences of several streams."""
        if layout.kind == "scales":
            return "it predicts one position after the other over a grid or a sequence, not scale by scale"
        if layout.streams == 1:
            return "it models several streams of codes; ar models one"
        if layout.streams > layout.positions + 1:
            return f"its inner head has rotations for {layout.positions + 1} streams, one more than positions"
        return None

    def build(self, layout: TokenLayout, classes: int) -> FAR:
        """Build it for the tokens of `layout` and labels in `[0, classes)`."""
        return FAR(self, layout, classes)


class FAR(Generator):
    """A causal backbone over `[class, position 0, ..., position L-2]` and an inner head over the streams of a position.

    The inner head reads `[context, stream 0, ..., stream S-2]` with the tables that embed tokens for the backbone, and
    the first S rotations of the backbone's table; its output s predicts stream s.
    """

    options: FAROptions

    def __init__(self, options: FAROptions, layout: TokenLayout, classes: int) -> None:
        super().__init__(options, layout, classes)
        dim = options.dim
        self.condition = ClassPrefix(classes, dim)
        self.embeddings = nn.ModuleList(nn.Embedding(size, dim) for size in layout.vocab)
        if options.aggregation == "projection":
            self.aggregation = nn.Linear(layout.streams * dim, dim)
        self.transformer = Transformer(options.architecture(options.layers))
        self.inner = Transformer(options.architecture(options.inner_layers))
        self.norm = RMSNorm(dim, options.norm_eps)
        self.outputs = nn.ModuleList(nn.Linear(dim, size, bias=False) for size in layout.vocab)
        initialise(self)
        for output in self.outputs:
            nn.init.zeros_(output.weight)  # type: ignore[arg-type]

    def loss(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Mean cross entropy over all positions, one term per stream.

        In training mode labels are dropped at random, by torch's global generator.

        Raises:
            UserError: tokens or labels of a wrong shape or out of range.
        """
        check_batch(tokens, labels, self.token_layout, self.classes)
        null = dropped_labels(labels, self.options.label_dropout) if self.training else None
        logits = self._inner_logits(tokens, self._contexts(tokens, labels, null))
        return stream_losses(logits, tokens, self.options.objective)

    def logits(self, tokens: Tensor, labels: Tensor) -> list[Tensor]:
        """Logits of every token given the positions before it and the streams before it (teacher forcing).

        Args:
            tokens: `(B, L, S)`, or the first N of the L.
            labels: `(B,)` in `[0, classes]`, where `classes` is the null class.

        Returns:
            For each stream `(B, L, K)` float32, or `(B, N, K)`.
        """
        return self._inner_logits(tokens, self.contexts(tokens, labels))

    def contexts(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """What the backbone makes of each position, `(B, L, D)`, for arguments as those of `logits`."""
        return self._contexts(tokens, labels, None)

    def inner_states(self, tokens: Tensor, contexts: Tensor) -> Tensor:
        """Outputs of the inner head `(B, L, S, D)`, not normed, for tokens `(B, L, S)` and contexts `(B, L, D)`."""
        before = [table(tokens[:, :, stream]) for stream, table in enumerate(self.embeddings[:-1])]
        rows = torch.stack([contexts, *before], dim=2)
        hidden: Tensor = self.inner(rows.flatten(0, 1), rotary=self._rotary(tokens.device)[: rows.shape[2]])
        return hidden.view(rows.shape)

    def sample(self, labels: Tensor, settings: SamplingSettings, indices: Tensor | None = None) -> Tensor:
        """Draw tokens `(B, L, S)` for labels `(B,)`, one stream of one position after the other, with caches.

        Guidance doubles the batch on both levels. Sample i takes one uniform number per token, of `(seed, i, token)`.

        Args:
            labels: `(B,)` in `[0, classes)`, on the device of the model.
            settings: guidance, temperature, filters, of all streams or of each, and seed.
            indices: `(B,)`, the numbers of the samples within the run; by default 0, 1, ...

        Raises:
            UserError: a label out of range; guidance for a model that was trained without label dropout; settings for
                another number of streams.
        """
        check_labels(labels, self.classes)
        return sample_one_by_one(self, self.decode, self.options.label_dropout, labels, settings, indices)

    def decode(self, labels: Tensor, sampler: TokenSampler) -> Tensor:
        """What `sample` does, with a sampler that is given: tokens `(B, L, S)` for labels `(B,)`."""
        layout, rows = self.token_layout, sampler.twice(labels)
        rotary = self._rotary(labels.device)
        cache = self.transformer.new_cache(len(rows), layout.positions)
        inner_cache = self.inner.new_cache(len(rows), layout.streams)
        tokens = torch.empty(len(labels), layout.positions, layout.streams, dtype=torch.int64, device=labels.device)
        inputs = self.condition(rows, sampler.null_rows())
        for position in range(layout.positions):
            hidden = self.transformer(inputs, rotary=rotary[position : position + 1], cache=cache)
            embedded = []
            inner_cache.clear()
            for stream, table in enumerate(self.embeddings):
                logits = self._stream_logits(hidden, stream, rotary, inner_cache)
                tokens[:, position, stream] = sampler.draw(logits, position, stream)
                hidden = sampler.twice(table(tokens[:, position, stream]))[:, None]
                embedded.append(hidden)
            inputs = self._aggregated(embedded)
        return tokens

    def _stream_logits(self, inputs: Tensor, stream: int, rotary: Tensor, cache: Cache) -> Tensor:
        hidden = self.inner(inputs, rotary=rotary[stream : stream + 1], cache=cache)[:, -1]
        logits: Tensor = self.outputs[stream](self.norm(hidden))
        return logits.float()

    def _contexts(self, tokens: Tensor, labels: Tensor, null: Tensor | None) -> Tensor:
        embedded = [table(tokens[:, :-1, stream]) for stream, table in enumerate(self.embeddings)]
        inputs = torch.cat([self.condition(labels, null), self._aggregated(embedded)], dim=1)
        inputs = F.dropout(inputs, self.options.token_dropout, self.training)
        contexts: Tensor = self.transformer(inputs, rotary=self._rotary(tokens.device)[: inputs.shape[1]])
        return contexts

    def _inner_logits(self, tokens: Tensor, contexts: Tensor) -> list[Tensor]:
        hidden = self.norm(self.inner_states(tokens, contexts))
        return [output(hidden[:, :, stream]).float() for stream, output in enumerate(self.outputs)]

    def _aggregated(self, embedded: list[Tensor]) -> Tensor:
        """Embeddings of each stream `(B, T, D)` to the input of the backbone `(B, T, D)`."""
        if self.options.aggregation == "sum":
            return torch.stack(embedded).sum(0)
        inputs: Tensor = self.aggregation(torch.cat(embedded, dim=-1))
        return inputs

    def _rotary(self, device: torch.device) -> Tensor:
        return self.options.rotary(self.token_layout, device)
