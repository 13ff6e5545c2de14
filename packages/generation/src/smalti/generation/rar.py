"""RAR: autoregressive generation that was trained in random orders (Yu et al. 2024).

Legend: B batch, L token positions, S streams, K codes of a stream, T = L S sub-tokens in a row, D width of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from smalti.core.contracts import Generator, check_labels
from smalti.core.layout import TokenLayout
from smalti.core.options import GeneratorOptions
from smalti.core.sampling_settings import SamplingSettings
from smalti.generation.blocks import Architecture
from smalti.generation.checks import Heads, check_batch, refused
from smalti.generation.conditions import ClassPrefix, dropped_labels
from smalti.generation.decoding import sample_one_by_one
from smalti.generation.losses import stream_losses
from smalti.generation.norms import ModulatedNorm
from smalti.generation.sampling import TokenSampler
from smalti.generation.streams import embedded, stream_logits
from smalti.generation.transformer import INITIAL_STD, Transformer, initialise, initialise_modulation

PREFIX = 2
"""Positions before the tokens: a start, and the class."""

MODULATED_AT_ONCE = 512
"""Labels times positions whose modulations are computed together: enough for a fast product, and little memory."""


class RAROptions(GeneratorOptions):
    """Options of `RAR`; the defaults are RAR-B.

    Args:
        layers: blocks.
        dim: width of the model.
        heads: of attention.
        ffn_dim: width of the feed-forward.
        dropout: after both branches of every block.
        attention_dropout: of the attention matrix.
        label_dropout: chance to train a sample under the null class, which guidance needs.
        norm_eps: of all norms.
        random_until: update of training up to which all orders are random.
        raster_from: update from which all orders are raster; between the two the share falls linearly.
        flatten: take several streams, one after the other at each position.
    """

    name: Literal["rar"] = "rar"
    layers: Annotated[int, Field(ge=1)] = 24
    dim: Annotated[int, Field(ge=1)] = 768
    heads: Heads = 16
    ffn_dim: Annotated[int, Field(ge=1)] = 3072
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    label_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    random_until: Annotated[int, Field(ge=0)] = 125_000
    raster_from: Annotated[int, Field(ge=0)] = 187_500
    flatten: bool = False

    @field_validator("raster_from")
    @classmethod
    def _comes_last(cls, raster_from: int, info: ValidationInfo) -> int:
        random_until = info.data.get("random_until")
        if random_until is not None and raster_from < random_until:
            raise ValueError(f"orders cannot all be raster before random_until, {random_until}")
        return raster_from

    def supports(self, layout: TokenLayout) -> str | None:
        """Grids and sequences of one stream, or of several where `flatten` is on."""
        return refused(layout, "one token after the other over a grid or a sequence", flatten=self.flatten)

    def architecture(self) -> Architecture:
        """Of the blocks."""
        return Architecture(
            layers=self.layers,
            dim=self.dim,
            heads=self.heads,
            ffn_dim=self.ffn_dim,
            norm="layer",
            norm_eps=self.norm_eps,
            ffn="gelu",
            bias=True,
            qkv_bias="all",
            query_key_norm="layer",
            modulation="block",
            condition_dim=self.dim,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
        )

    def random_share(self, step: int) -> float:
        """The share of random orders at an update of training."""
        length = max(self.raster_from - self.random_until, 1)
        return min(max(1 - (step - self.random_until) / length, 0.0), 1.0)

    def build(self, layout: TokenLayout, classes: int) -> RAR:
        """Build it for the tokens of `layout` and labels in `[0, classes)`."""
        return RAR(self, layout, classes)


class RAR(Generator):
    """A causal transformer over `[start, class, tokens in any order]`, which is raster in sampling.

    Every input but the first also holds where the token that it predicts belongs (target-aware positions). The class
    and the number of the input modulate every norm. Several streams stand one after the other at each position,
    whatever the order of positions, with tables and outputs of their own.
    """

    options: RAROptions
    random_share: Tensor

    def __init__(self, options: RAROptions, layout: TokenLayout, classes: int) -> None:
        super().__init__(options, layout, classes)
        dim, length = options.dim, layout.positions * layout.streams
        self.condition = ClassPrefix(classes, dim)
        self.embeddings = nn.ModuleList(nn.Embedding(size, dim) for size in layout.vocab)
        self.start = nn.Parameter(torch.zeros(dim))
        self.positions = nn.Parameter(torch.empty(PREFIX + length, dim))
        self.targets = nn.Parameter(torch.empty(length, dim))
        self.times = nn.Parameter(torch.empty(PREFIX - 1 + length, dim))
        self.transformer = Transformer(options.architecture())
        self.norm = ModulatedNorm("plain-layer", dim, options.norm_eps, dim)
        self.outputs = nn.ModuleList(nn.Linear(dim, size) for size in layout.vocab)
        # Not a number, which would be a constant of a compiled forward pass.
        self.register_buffer("random_share", torch.tensor(options.random_share(0)), persistent=False)
        initialise(self)
        initialise_modulation(self, gates=0, others=0)
        for table in (self.positions, self.targets, self.times):
            nn.init.normal_(table, std=INITIAL_STD)

    def begin_step(self, step: int) -> None:
        """Orders are random up to `random_until`, then less and less often."""
        self.random_share.fill_(self.options.random_share(step))

    def loss(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Mean cross entropy over all sub-tokens, one term per stream.

        In training mode orders are drawn and labels dropped at random, by torch's global generator; else the order is
        raster.

        Raises:
            UserError: tokens or labels of a wrong shape or out of range.
        """
        check_batch(tokens, labels, self.token_layout, self.classes)
        if not self.training:
            return stream_losses(self._logits(tokens, labels, None, None), tokens)
        null = dropped_labels(labels, self.options.label_dropout)
        orders = self._orders(len(tokens), tokens.device)
        logits = self._logits(tokens, labels, null, orders)
        return stream_losses(logits, tokens.take_along_dim(orders[:, :, None], dim=1))

    def logits(self, tokens: Tensor, labels: Tensor, orders: Tensor | None = None) -> list[Tensor]:
        """Logits of every token given those before it (teacher forcing).

        Args:
            tokens: `(B, L, S)`, or in raster order the first N of the L; the last sub-token is not read.
            labels: `(B,)` in `[0, classes]`, where `classes` is the null class.
            orders: `(B, L)` int64, permutations of the positions; by default raster.

        Returns:
            For each stream `(B, L, K)` float32, or `(B, N, K)`; row k is of position `orders[:, k]`.
        """
        return self._logits(tokens, labels, None, orders)

    def sample(self, labels: Tensor, settings: SamplingSettings, indices: Tensor | None = None) -> Tensor:
        """Draw tokens `(B, L, S)` for labels `(B,)`, in raster order with a cache.

        Guidance doubles the batch. Sample i takes one uniform number per sub-token, of `(seed, i, sub-token)`.

        Args:
            labels: `(B,)` in `[0, classes)`, on the device of the model.
            settings: guidance, temperature, filters and seed.
            indices: `(B,)`, the numbers of the samples within the run; by default 0, 1, ...

        Raises:
            UserError: a label out of range; guidance for a model that was trained without label dropout; settings for
                another number of streams.
        """
        check_labels(labels, self.classes)
        return sample_one_by_one(self, self.decode, self.options.label_dropout, labels, settings, indices)

    def decode(self, labels: Tensor, sampler: TokenSampler) -> Tensor:
        """What `sample` does, with a sampler that is given: tokens `(B, L, S)` for labels `(B,)`."""
        layout, rows, null = self.token_layout, sampler.twice(labels), sampler.null_rows()
        if null is not None:
            rows = rows.masked_fill(null, self.classes)
        cache = self.transformer.new_cache(len(rows), len(self.times))
        tokens = torch.empty(len(labels), layout.positions, layout.streams, dtype=torch.int64, device=labels.device)
        inputs = self._prefix(self.condition(rows)) + F.pad(self.targets[:1], (0, 0, PREFIX - 1, 0))
        for index, (modulations, final) in enumerate(self._step_modulations(rows)):
            position, stream = divmod(index, layout.streams)
            hidden = self.transformer(inputs, cache=cache, modulations=modulations)[:, -1:]
            logits = self.outputs[stream](self.norm(hidden, final[:, -1:])).float()
            drawn = sampler.draw(logits[:, 0], position, stream)
            tokens[:, position, stream] = drawn
            # Behind the last sub-token there is no target, and nothing reads this.
            places = self.positions[PREFIX + index] + self.targets[(index + 1) % len(self.targets)]
            inputs = sampler.twice(self.embeddings[stream](drawn) + places)[:, None]
        return tokens

    def _step_modulations(self, labels: Tensor) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Of the blocks and of the last norm, for each step of decoding: of the whole prefix, then of one position.

        They are computed once for every label, of which half are the null class, and some positions at a time.
        """
        kinds, which = labels.unique(return_inverse=True)
        condition = self.condition(kinds)
        count = max(PREFIX, MODULATED_AT_ONCE // max(len(kinds), 1))
        for start in range(0, len(self.times), count):
            given = condition + self.times[start : start + count]
            blocks, final = self.transformer.modulations(given), self.norm.modulation(given)
            assert blocks is not None
            first = PREFIX if start == 0 else 1
            for end in range(first, given.shape[1] + 1):
                chosen = slice(0 if end == first else end - 1, end)
                yield [block[which, chosen] for block in blocks], final[which, chosen]

    def _logits(self, tokens: Tensor, labels: Tensor, null: Tensor | None, orders: Tensor | None) -> list[Tensor]:
        streams, condition = self.token_layout.streams, self.condition(labels, null)
        if orders is None:
            places = torch.arange(tokens.shape[1] * streams, device=tokens.device)[None]
        else:
            tokens = tokens.take_along_dim(orders[:, :, None], dim=1)
            places = (orders[:, :, None] * streams + torch.arange(streams, device=orders.device)).flatten(1)
        before = (embedded(self.embeddings, tokens) + self.positions[PREFIX + places])[:, :-1]
        targets = F.pad(self.targets[places], (0, 0, PREFIX - 1, 0))
        inputs = torch.cat([self._prefix(condition), before], dim=1) + targets
        given = condition + self.times[: inputs.shape[1]]
        hidden = self.transformer(inputs, modulations=self.transformer.modulations(given))
        normed = self.norm(hidden, self.norm.modulation(given))[:, PREFIX - 1 :]
        return stream_logits(self.outputs, normed)

    def _prefix(self, condition: Tensor) -> Tensor:
        """`(B, 2, D)`, with positions."""
        start = self.start.expand_as(condition)
        return torch.cat([start, condition], dim=1) + self.positions[:PREFIX]

    def _orders(self, batch: int, device: torch.device) -> Tensor:
        """Permutations of the positions, int64 `(B, L)`: random ones in their share, else raster."""
        length = self.token_layout.positions
        anyhow = torch.rand(batch, length, device=device).argsort(1)
        raster = torch.arange(length, device=device)
        return torch.where(torch.rand(batch, 1, device=device) < self.random_share, anyhow, raster)
