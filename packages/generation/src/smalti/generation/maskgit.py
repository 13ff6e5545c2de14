"""MaskGIT: masked generation, many tokens at a time (Chang et al. 2022), in the two forms that TiTok's generators have.

Legend: B batch, L token positions, S streams, K codes of a stream, N = L S tokens of a sample, D width of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from smalti.core.contracts import Generator, check_labels
from smalti.core.layout import TokenLayout
from smalti.core.noise import uniform
from smalti.core.options import GeneratorOptions
from smalti.core.sampling_settings import SamplingSettings
from smalti.generation.blocks import Architecture
from smalti.generation.checks import Heads, check_batch, refused
from smalti.generation.conditions import ClassPrefix, dropped_labels
from smalti.generation.decoding import decoding
from smalti.generation.losses import named_terms
from smalti.generation.masking import Schedule, gumbel, least_confident, masked_counts, random_mask
from smalti.generation.sampling import check_guidance, guided, next_tokens
from smalti.generation.streams import embedded, stream_logits
from smalti.generation.transformer import INITIAL_STD, SkipTransformer, Transformer, initialise

ANNEALING = (0.5, 0.8)
"""With `annealing`, logits are divided by 0.5 + 0.8 times the share of steps to come (TiTok)."""


class MaskGITOptions(GeneratorOptions):
    """Options of `MaskGIT`; the defaults are those of TiTok's generators for L-32 and B-64.

    Args:
        form: `vit`, blocks as BERT's, with norms behind the residual sums; `uvit`, norms before the branches, and
            skips from the first half of the blocks to the second (U-ViT, Bao et al. 2023).
        layers: blocks; in `uvit`, where the number is even, without the one in the middle.
        dim: width of the model.
        heads: of attention.
        ffn_dim: width of the feed-forward.
        dropout: after the embeddings of `vit`, and after both branches of every block.
        attention_dropout: of the attention matrix.
        label_dropout: chance to train a sample under the null class, which guidance needs.
        norm_eps: of all norms.
        schedule: share of masked tokens, in training at random and in sampling from step to step.
        label_smoothing: of the cross entropy.
        unmasked_weight: of tokens that are not masked, in the cross entropy; masked ones have 1.
        steps: of sampling, where the settings do not say how many.
        flatten: take several streams, one after the other at each position.
    """

    name: Literal["maskgit"] = "maskgit"
    form: Literal["vit", "uvit"] = "vit"
    layers: Annotated[int, Field(ge=1)] = 24
    dim: Annotated[int, Field(ge=1)] = 768
    heads: Heads = 16
    ffn_dim: Annotated[int, Field(ge=1)] = 3072
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    label_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    norm_eps: Annotated[float, Field(gt=0)] = 1e-12
    schedule: Schedule = "arccos"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    unmasked_weight: Annotated[float, Field(ge=0)] = 0.1
    steps: Annotated[int, Field(ge=1)] = 8
    flatten: bool = False

    @field_validator("layers")
    @classmethod
    def _has_halves(cls, layers: int, info: ValidationInfo) -> int:
        if info.data.get("form") == "uvit" and layers % 2:
            raise ValueError(f"uvit has an even number of layers, beside the one in the middle, not {layers}")
        return layers

    def supports(self, layout: TokenLayout) -> str | None:
        """Grids and sequences of one stream, or of several where `flatten` is on."""
        return refused(layout, "any tokens of a grid or a sequence", flatten=self.flatten)

    def architecture(self) -> Architecture:
        """Of the blocks."""
        vit = Architecture(
            layers=self.layers,
            dim=self.dim,
            heads=self.heads,
            ffn_dim=self.ffn_dim,
            norm="layer",
            norm_eps=self.norm_eps,
            ffn="gelu",
            bias=True,
            qkv_bias="all",
            post_norm=True,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
        )
        return vit if self.form == "vit" else replace(vit, qkv_bias="none", post_norm=False)

    def build(self, layout: TokenLayout, classes: int) -> MaskGIT:
        """Build it for the tokens of `layout` and labels in `[0, classes)`."""
        return MaskGIT(self, layout, classes)


class MaskGIT(Generator):
    """A bidirectional transformer over `[class, tokens]`, some of which are masked; it predicts all of them.

    A masked token of a stream is its number of codes, K. Several streams stand one after the other at each position,
    with tables and outputs of their own.
    """

    options: MaskGITOptions

    def __init__(self, options: MaskGITOptions, layout: TokenLayout, classes: int) -> None:
        super().__init__(options, layout, classes)
        dim, architecture = options.dim, options.architecture()
        self.condition = ClassPrefix(classes, dim)
        self.embeddings = nn.ModuleList(nn.Embedding(size + 1, dim) for size in layout.vocab)
        self.positions = nn.Parameter(torch.empty(1 + layout.positions * layout.streams, dim))
        self.transformer = Transformer(architecture) if options.form == "vit" else SkipTransformer(architecture)
        # before the blocks of BERT, behind the others
        self.norm = nn.LayerNorm(dim, options.norm_eps)
        self.outputs = nn.ModuleList(nn.Linear(dim, size) for size in layout.vocab)
        initialise(self)
        nn.init.normal_(self.positions, std=INITIAL_STD)

    def loss(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Cross entropy of randomly masked tokens, and with less weight of the others; one term per stream.

        Tokens are masked, and in training mode labels dropped, by torch's global generator.

        Raises:
            UserError: tokens or labels of a wrong shape or out of range.
        """
        check_batch(tokens, labels, self.token_layout, self.classes)
        options = self.options
        null = dropped_labels(labels, options.label_dropout) if self.training else None
        masked = random_mask(len(tokens), tokens[0].numel(), options.schedule, tokens.device).view(tokens.shape)
        logits = self._logits(torch.where(masked, self._masks(tokens.device), tokens), labels, null)
        weights = torch.where(masked, 1.0, options.unmasked_weight)
        shares = weights / weights.sum()
        terms = [
            F.cross_entropy(
                part.transpose(1, 2), tokens[:, :, s], label_smoothing=options.label_smoothing, reduction="none"
            )
            .mul(shares[:, :, s])
            .sum()
            for s, part in enumerate(logits)
        ]
        return named_terms(terms)

    def logits(self, tokens: Tensor, labels: Tensor) -> list[Tensor]:
        """Logits of every token given those that are not masked.

        Args:
            tokens: `(B, L, S)`, in `[0, K]`, where K is a masked token.
            labels: `(B,)` in `[0, classes]`, where `classes` is the null class.

        Returns:
            For each stream `(B, L, K)` float32.
        """
        return self._logits(tokens, labels, None)

    def sample(self, labels: Tensor, settings: SamplingSettings, indices: Tensor | None = None) -> Tensor:
        """Draw tokens `(B, L, S)` for labels `(B,)`, in a few steps that each fix some.

        Every step draws all masked tokens and masks the least confident ones again. The temperature falls linearly to
        0 at the last step; it is that of the draws and of the Gumbel noise in the confidence. Guidance takes a second
        pass. Sample i takes its noise of `(seed, i, step)`.

        Args:
            labels: `(B,)` in `[0, classes)`, on the device of the model.
            settings: steps, guidance, temperature, filters and seed.
            indices: `(B,)`, the numbers of the samples within the run; by default 0, 1, ...

        Raises:
            UserError: a label out of range; guidance for a model that was trained without label dropout; settings for
                another number of streams.
        """
        return self.sample_traced(labels, settings, indices)[0]

    def sample_traced(
        self, labels: Tensor, settings: SamplingSettings, indices: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `sample`, with the step that fixed each position, the last of its streams."""
        check_labels(labels, self.classes)
        check_guidance(settings, self.options.label_dropout)
        if indices is None:
            indices = torch.arange(len(labels), device=labels.device)
        with decoding(self, settings):
            tokens, fixed = self._decode(labels, settings, indices)
        # Tensors made in inference mode could not be trained on.
        return tokens.clone(), fixed.clone()

    def _decode(self, labels: Tensor, settings: SamplingSettings, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens `(B, L, S)`, and the step that fixed each position `(B, L)`."""
        layout, per_stream = self.token_layout, settings.per_stream(self.token_layout.streams)
        steps = settings.steps or self.options.steps
        masks = self._masks(labels.device)
        tokens = masks.expand(len(labels), layout.positions, -1)
        fixed = torch.zeros_like(tokens)
        counts = masked_counts(layout.positions * layout.streams, steps, self.options.schedule)
        for step, count in enumerate(counts):
            masked = tokens == masks
            logits = self._guided(tokens, labels, per_stream, step, steps)
            # Draws have the numbers from 0 on, confidences those from `steps` on, each of its stream.
            pairs = [
                _drawn(
                    part, chosen, indices, (step + 1) / steps, [n * layout.streams + s for n in (step, steps + step)]
                )
                for s, (chosen, part) in enumerate(zip(per_stream, logits, strict=True))
            ]
            drawn, confidence = (torch.stack(parts, dim=2) for parts in zip(*pairs, strict=True))
            tokens = torch.where(masked, drawn, tokens)
            fixed = torch.where(masked, step, fixed)
            again = least_confident(confidence.masked_fill(~masked, torch.inf).flatten(1), count)
            tokens = torch.where(again.view(tokens.shape), masks, tokens)
        return tokens, fixed.amax(-1)

    def _guided(
        self, tokens: Tensor, labels: Tensor, per_stream: tuple[SamplingSettings, ...], step: int, steps: int
    ) -> list[Tensor]:
        """Logits of a step; a null pass only where some stream is guided at it."""
        weights = [settings.guidance_weight(step, step / steps) for settings in per_stream]
        if all(weight == 1 for weight in weights):
            return self._logits(tokens, labels, None)
        both = self._logits(
            torch.cat([tokens, tokens]), torch.cat([labels, torch.full_like(labels, self.classes)]), None
        )
        return [guided(part, weight) for part, weight in zip(both, weights, strict=True)]

    def _logits(self, tokens: Tensor, labels: Tensor, null: Tensor | None) -> list[Tensor]:
        inputs = torch.cat([self.condition(labels, null), embedded(self.embeddings, tokens)], dim=1) + self.positions
        if self.options.form == "vit":
            inputs = F.dropout(self.norm(inputs), self.options.dropout, self.training)
            hidden = self.transformer(inputs, mask="none")
        else:
            hidden = self.norm(self.transformer(inputs))
        return stream_logits(self.outputs, hidden[:, 1:])

    def _masks(self, device: torch.device) -> Tensor:
        """The masked token of each stream, `(S,)`."""
        return torch.tensor(self.token_layout.vocab, device=device)


def _drawn(
    logits: Tensor, settings: SamplingSettings, indices: Tensor, progress: float, numbers: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Tokens of a step and their confidence, both `(B, L)`.

    Args:
        logits: `(B, L, K)`, guided.
        settings: of this stream.
        indices: `(B,)`.
        progress: share of steps done with this one.
        numbers: of the noise of the draw, and of the confidence.
    """
    left = 1 - progress
    if settings.annealing:
        logits = logits / (ANNEALING[0] + ANNEALING[1] * left)
    assert not isinstance(settings.temperature, tuple)
    temperature = settings.temperature * left
    tokens = next_tokens(logits, settings.model_copy(update={"temperature": temperature}), indices, numbers[0])
    confidence = logits.take_along_dim(tokens[:, :, None], dim=-1)[:, :, 0]
    if temperature:
        noise = uniform(settings.seed, indices, numbers[1], lanes=logits.shape[1])
        confidence = confidence + temperature * gumbel(noise)
    return tokens, confidence
