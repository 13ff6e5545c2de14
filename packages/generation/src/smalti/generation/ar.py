"""AR: next-token prediction (LlamaGen, Sun et al. 2024), and its relatives: IBQ's transformer and taming's minGPT.

Legend: B batch, L token positions, S streams, K codes of a stream, T = L S sub-tokens in a row, P prefix positions,
D width of the model, d width of a head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import ValidationInfo, field_validator
from torch import Tensor, nn

from smalti.core.captions import CaptionOptions
from smalti.core.contracts import Generator, check_labels
from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout
from smalti.core.sampling_settings import SamplingSettings
from smalti.generation.attention import Mask
from smalti.generation.blocks import Architecture
from smalti.generation.cache import Cache
from smalti.generation.checks import check_batch, refused
from smalti.generation.conditions import CaptionPrefix, ClassPrefix, dropped_labels
from smalti.generation.decoding import sample_one_by_one
from smalti.generation.llama import LlamaOptions
from smalti.generation.losses import stream_losses
from smalti.generation.norms import ModulatedNorm, build_norm
from smalti.generation.sampling import TokenSampler
from smalti.generation.streams import embedded, stream_logits
from smalti.generation.transformer import Transformer, initialise, initialise_modulation


class AROptions(LlamaOptions):
    """Options of `AR`.

    Args:
        blocks: `llama`, LlamaGen's: RMSNorm, rotary positions, SwiGLU, no biases; `gpt`, minGPT's: LayerNorm, learned
            positions, GELU over 4 dim, biases. `ffn_multiple` and `rotary_base` are of `llama` alone.
        modulation: the class also modulates every norm (AdaLN), as in IBQ's transformer (Shi et al. 2024).
        shared_classes: label c is embedded as code c is, and there is no null class (taming-transformers).
        captions: the condition is a caption instead of a class.
        flatten: take several streams, one after the other at each position.
    """

    name: Literal["ar"] = "ar"
    blocks: Literal["llama", "gpt"] = "llama"
    modulation: bool = False
    shared_classes: bool = False
    captions: CaptionOptions | None = None
    flatten: bool = False

    @field_validator("shared_classes")
    @classmethod
    def _has_no_null_class(cls, shared: bool, info: ValidationInfo) -> bool:
        if shared and info.data.get("label_dropout"):
            raise ValueError("there is no null class: label_dropout must be 0")
        if shared and info.data.get("modulation"):
            raise ValueError("modulation needs a table of classes of its own")
        return shared

    @field_validator("captions")
    @classmethod
    def _are_the_only_condition(cls, captions: CaptionOptions | None, info: ValidationInfo) -> CaptionOptions | None:
        for other in ("modulation", "shared_classes"):
            if captions is not None and info.data.get(other):
                raise ValueError(f"{other} needs classes, not captions")
        return captions

    def supports(self, layout: TokenLayout) -> str | None:
        """Grids and sequences of one stream, or of several where `flatten` is on."""
        return refused(layout, "one token after the other over a grid or a sequence", flatten=self.flatten)

    def architecture(self, layers: int) -> Architecture:
        """Of the blocks."""
        blocks = super().architecture(layers)
        if self.modulation:
            blocks = replace(blocks, modulation="block", condition_dim=self.dim)
        if self.blocks == "gpt":
            blocks = replace(blocks, ffn_dim=4 * self.dim, norm="layer", ffn="gelu", bias=True, qkv_bias="all")
        return blocks

    def build(self, layout: TokenLayout, classes: int) -> AR:
        """Build it for the tokens of `layout` and labels in `[0, classes)`; captions take 1 class."""
        return AR(self, layout, classes)


class AR(Generator):
    """A causal transformer over `[prefix, token 0, ..., token T-2]`; its output at P - 1 + n predicts token n.

    Several streams stand one after the other at each position, with tables and outputs of their own; all of them
    have the rotation of their position. Where the options have captions, what is called labels here are their
    features, float `(B, P, E)`.
    """

    options: AROptions

    def __init__(self, options: AROptions, layout: TokenLayout, classes: int) -> None:
        super().__init__(options, layout, classes)
        self.captions = options.captions
        if options.shared_classes and classes > layout.vocab[0]:
            raise UserError(f"shared classes are codes: {classes} classes need a codebook of as many, not {layout}")
        dim, architecture = options.dim, options.architecture(options.layers)
        self.condition = _prefix(options, classes)
        self.embeddings = nn.ModuleList(nn.Embedding(size, dim) for size in layout.vocab)
        self.transformer = Transformer(architecture)
        norm, eps = architecture.norm, architecture.norm_eps
        self.norm = ModulatedNorm(norm, dim, eps, dim) if options.modulation else build_norm(norm, dim, eps)
        self.outputs = nn.ModuleList(nn.Linear(dim, size, bias=False) for size in layout.vocab)
        initialise(self)
        initialise_modulation(self, gates=1e-3, others=1.0)
        for output in self.outputs:
            nn.init.zeros_(output.weight)  # type: ignore[arg-type]
        if options.blocks == "gpt":
            length = self.prefix_length + layout.positions * layout.streams - 1
            self.positions = nn.Parameter(torch.zeros(length, dim))

    @property
    def prefix_length(self) -> int:
        """P."""
        return 1 if self.condition is None else self.condition.length

    def loss(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Mean cross entropy over all sub-tokens, one term per stream.

        In training mode labels are dropped at random, by torch's global generator.

        Raises:
            UserError: tokens or labels of a wrong shape or out of range.
        """
        if self.options.captions is None:
            check_batch(tokens, labels, self.token_layout, self.classes)
        else:
            self._check(labels)
            check_batch(tokens, None, self.token_layout, self.classes)
        null = dropped_labels(labels, self.options.label_dropout) if self.training else None
        return stream_losses(self._logits(tokens, labels, null), tokens)

    def logits(self, tokens: Tensor, labels: Tensor) -> list[Tensor]:
        """Logits of every token given those before it (teacher forcing).

        Args:
            tokens: `(B, L, S)`, or the first N of the L; the last sub-token is not read.
            labels: `(B,)` in `[0, classes]`, where `classes` is the null class.

        Returns:
            For each stream `(B, L, K)` float32, or `(B, N, K)`.
        """
        return self._logits(tokens, labels, None)

    def sample(self, labels: Tensor, settings: SamplingSettings, indices: Tensor | None = None) -> Tensor:
        """Draw tokens `(B, L, S)` for labels `(B,)`, one sub-token after the other with a cache.

        Guidance doubles the batch. Sample i takes one uniform number per sub-token, of `(seed, i, sub-token)`.

        Args:
            labels: `(B,)` in `[0, classes)`, on the device of the model.
            settings: guidance, temperature, filters and seed.
            indices: `(B,)`, the numbers of the samples within the run; by default 0, 1, ...

        Raises:
            UserError: a label out of range; guidance for a model that was trained without label dropout; settings for
                another number of streams.
        """
        self._check(labels)
        return sample_one_by_one(self, self.decode, self.options.label_dropout, labels, settings, indices)

    def _check(self, labels: Tensor) -> None:
        if self.condition is None:
            check_labels(labels, self.classes)
        else:
            self.condition.check(labels)

    def _logits(self, tokens: Tensor, labels: Tensor, null: Tensor | None) -> list[Tensor]:
        given = self._given(labels, null)
        inputs = torch.cat([given.prefix, embedded(self.embeddings, tokens)[:, :-1]], dim=1)
        inputs = F.dropout(inputs, self.options.token_dropout, self.training)
        hidden = self._hidden(inputs, given)[:, self.prefix_length - 1 :]
        return stream_logits(self.outputs, hidden)

    def decode(self, labels: Tensor, sampler: TokenSampler) -> Tensor:
        """What `sample` does, with a sampler that is given: tokens `(B, L, S)` for labels `(B,)`."""
        layout, rows = self.token_layout, sampler.twice(labels)
        given = self._given(rows, sampler.null_rows())
        cache = self.transformer.new_cache(len(rows), self.prefix_length + layout.positions * layout.streams - 1)
        tokens = torch.empty(len(labels), layout.positions, layout.streams, dtype=torch.int64, device=labels.device)
        inputs = given.prefix
        for position in range(layout.positions):
            for stream, (table, output) in enumerate(zip(self.embeddings, self.outputs, strict=True)):
                logits = output(self._hidden(inputs, given, cache)[:, -1]).float()
                drawn = sampler.draw(logits, position, stream)
                tokens[:, position, stream] = drawn
                inputs = sampler.twice(table(drawn))[:, None]
        return tokens

    def _given(self, labels: Tensor, null: Tensor | None) -> _Given:
        rotary, layout = None, self.token_layout
        if self.options.blocks == "llama":
            rotary = self.options.rotary(layout, labels.device, self.prefix_length, layout.streams)
        if self.condition is None:
            return _Given(self.embeddings[0](labels)[:, None], rotary)
        prefix = self.condition(labels, null)
        final = self.norm.modulation(prefix) if isinstance(self.norm, ModulatedNorm) else None
        return _Given(prefix, rotary, self.condition.padding(labels), self.transformer.modulations(prefix), final)

    def _hidden(self, inputs: Tensor, given: _Given, cache: Cache | None = None) -> Tensor:
        """Normed outputs `(B, T, D)` for embedded inputs `(B, T, D)` that follow those in the cache."""
        start = cache.length if cache is not None else 0
        end = start + inputs.shape[1]
        if self.options.blocks == "gpt":
            inputs = inputs + self.positions[start:end]
        rotary = None if given.rotary is None else given.rotary[start:end]
        mask: Mask = "causal" if given.padding is None else _without_padding(given.padding, start, end)
        hidden = self.transformer(inputs, rotary=rotary, mask=mask, cache=cache, modulations=given.modulations)
        normed: Tensor = self.norm(hidden) if given.final is None else self.norm(hidden, given.final)
        return normed


class _Given(NamedTuple):
    """What the condition makes of a batch: computed once, whatever the tokens.

    `prefix` `(B, P, D)`; `rotary` the whole table; `padding` `(B, P)`, true where the prefix holds nothing;
    `modulations` of the blocks, and `final` that of the last norm.
    """

    prefix: Tensor
    rotary: Tensor | None = None
    padding: Tensor | None = None
    modulations: list[Tensor] | None = None
    final: Tensor | None = None


def _prefix(options: AROptions, classes: int) -> ClassPrefix | CaptionPrefix | None:
    """None where classes are embedded as codes are."""
    if options.captions is not None:
        return CaptionPrefix(options.captions, options.dim)
    return None if options.shared_classes else ClassPrefix(classes, options.dim)


def _without_padding(padding: Tensor, start: int, end: int) -> Tensor:
    """Positions start to end see what is before them and is no padding, and themselves: `(B, 1, T, N)`."""
    place = torch.arange(end, device=padding.device)
    sees = place <= place[start:, None]
    hidden = F.pad(padding, (0, end - padding.shape[1]))
    return ((sees & ~hidden[:, None]) | (place == place[start:, None]))[:, None]
