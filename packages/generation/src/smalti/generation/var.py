"""VAR: next-scale prediction (Tian et al. 2024), and over product branches ImageFolder's generator (Li et al. 2024).

Legend: B batch, L token positions, S streams, K codes of a stream, n scales, p_k area of scale k, h w latent grid,
D width of the model, C width of the tokenizer's latent.
"""

from __future__ import annotations

import copy
import math
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from smalti.core.contracts import Generator, Quantizer, Tokenizer, check_labels
from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout
from smalti.core.options import GeneratorOptions, QuantizerOptions, Slot
from smalti.core.sampling_settings import SamplingSettings
from smalti.core.tokenizer import ComposedTokenizer
from smalti.generation.attention import BlockCausal
from smalti.generation.blocks import Architecture
from smalti.generation.checks import Heads, check_batch
from smalti.generation.conditions import ClassPrefix, dropped_labels
from smalti.generation.decoding import decoding
from smalti.generation.losses import named_terms
from smalti.generation.norms import ModulatedNorm
from smalti.generation.sampling import TokenSampler
from smalti.generation.transformer import Transformer, initialise, initialise_modulation
from smalti.generation.var_editing import Kept, kept_positions
from smalti.generation.var_inputs import ScaleInputs
from smalti.generation.var_smoothing import smoothed_codes
from smalti.generation.var_training import Growth, Masking


class VAROptions(GeneratorOptions):
    """Options of `VAR`; the defaults are its depth 16. Depth d has layers d, dim 64 d and heads d.

    Args:
        layers: blocks.
        dim: width of the model.
        heads: of attention.
        ffn_ratio: width of the feed-forward over dim.
        cosine_attention: queries and keys of unit length, and a learned factor per head; else a quarter of the usual
            scale.
        shared_modulation: one AdaLN projection for all blocks, to which every block adds a table (VAR at 512 pixels).
        norm_eps: of all norms.
        drop_path: chance to leave out a branch of the last block, per sample, rising linearly from 0 at the first;
            None is VAR's 0.1 layers / 24.
        label_dropout: chance to train a sample under the null class, which guidance needs.
        gate_start: multiplies the initial weights of the gates of AdaLN (VAR's `alng`, 1e-3 to 5e-6 by depth).
        growth: begin with the coarse scales and add the finer ones in training; None for all from the start.
        masking: replace words by a learned one in training (ImageFolder); None never does.
        code_width: C, where no tokenizer tells it.
        quantizer: of the tokenizer; `attach` fills it in.
    """

    name: Literal["var"] = "var"
    layers: Annotated[int, Field(ge=1)] = 16
    dim: Annotated[int, Field(ge=1)] = 1024
    heads: Heads = 16
    ffn_ratio: Annotated[float, Field(gt=0)] = 4.0
    cosine_attention: bool = True
    shared_modulation: bool = False
    norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    drop_path: Annotated[float, Field(ge=0, lt=1)] | None = None
    label_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    gate_start: Annotated[float, Field(ge=0)] = 1e-5
    growth: Growth | None = None
    masking: Masking | None = None
    code_width: Annotated[int, Field(ge=1)] | None = None
    quantizer: Annotated[QuantizerOptions, Slot("quantizer")] | None = None

    def supports(self, layout: TokenLayout) -> str | None:
        """Scales, of any number of streams."""
        if layout.kind != "scales":
            return f"it predicts one scale after the other, and a {layout.kind} has none"
        if self.growth is not None and self.growth.first > len(layout.shape):
            return f"growth begins with {self.growth.first} scales, and there are {len(layout.shape)}"
        return None

    def architecture(self) -> Architecture:
        """Of the blocks."""
        return Architecture(
            layers=self.layers,
            dim=self.dim,
            heads=self.heads,
            ffn_dim=round(self.ffn_ratio * self.dim),
            norm="plain-layer",
            norm_eps=self.norm_eps,
            ffn="gelu-tanh",
            bias=True,
            qkv_bias="query-value",
            query_key_norm="cosine" if self.cosine_attention else "none",
            attention_scale=None if self.cosine_attention else 0.25 / math.sqrt(self.dim // self.heads),
            modulation="shared" if self.shared_modulation else "block",
            condition_dim=self.dim,
            drop_path=0.1 * self.layers / 24 if self.drop_path is None else self.drop_path,
        )

    def build(self, layout: TokenLayout, classes: int) -> VAR:
        """Build it for the tokens of `layout` and labels in `[0, classes)`."""
        return VAR(self, layout, classes)


class Drawn(NamedTuple):
    """What sampling makes of a batch: tokens `(B, L, S)`, and the latent `(B, h, w, C)` that a decoder takes.

    The latent is that of the tokens, except where sampling was smooth.
    """

    tokens: Tensor
    latent: Tensor


class VAR(Generator):
    """A transformer over `[class, scale 1, ..., scale n-1]`, in which a scale sees itself and the coarser ones.

    The words of scale k are those of the latent of the scales before, averaged down to its grid; so it holds the
    tokenizer's quantizer, frozen, and is saved with it. Before `attach` gives it one, it can neither learn nor sample.
    """

    options: VAROptions
    newest_weight: Tensor

    def __init__(self, options: VAROptions, layout: TokenLayout, classes: int) -> None:
        super().__init__(options, layout, classes)
        dim, architecture = options.dim, options.architecture()
        self.condition = ClassPrefix(classes, dim)
        self.transformer = Transformer(architecture)
        self.norm = ModulatedNorm(architecture.norm, dim, architecture.norm_eps, dim)
        self.output = nn.Linear(dim, sum(layout.vocab))
        self.inputs = ScaleInputs(layout, dim, options.masking)
        self.areas = self.inputs.areas
        if options.growth is not None:
            # Not a number, which would be a constant of a compiled forward pass.
            self.register_buffer("newest_weight", torch.tensor(1.0), persistent=False)
        self.begin_step(0)
        self._initialise()
        if options.code_width is not None:
            self.inputs.take_width(options.code_width)
        if options.quantizer is not None:
            self._hold(options.quantizer.build())

    @property
    def quantizer(self) -> Quantizer:
        """That of the tokenizer, frozen; a `UserError` where there is none."""
        return self.inputs.held()

    def attach(self, tokenizer: Tokenizer) -> None:
        """Take over a copy of the tokenizer's quantizer, with its weights.

        Raises:
            UserError: tokens of another layout, a latent of another width, a quantizer that has no scales.
        """
        if not isinstance(tokenizer, ComposedTokenizer):
            raise UserError(f"var needs a tokenizer with a quantizer, and {tokenizer.options.name!r} has none")
        if tokenizer.layout() != self.token_layout:
            raise UserError(f"this generator is for {self.token_layout}, the tokenizer makes {tokenizer.layout()}")
        self._hold(copy.deepcopy(tokenizer.quantizer))

    def begin_step(self, step: int) -> None:
        """Growth and masking go by the step."""
        self.inputs.begin_step(step)
        growth = self.options.growth
        if growth is not None:
            self.learned_scales = growth.scales(step, len(self.areas))
            self.newest_weight.fill_(growth.weight(step, len(self.areas)))

    def loss(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Mean cross entropy over all positions, one term per stream; with `growth` of the scales there are by then.

        In training mode labels are dropped at random, by torch's global generator.

        Raises:
            UserError: tokens or labels of a wrong shape or out of range; no tokenizer was attached.
        """
        check_batch(tokens, labels, self.token_layout, self.classes)
        null = dropped_labels(labels, self.options.label_dropout) if self.training else None
        grows = self.training and self.options.growth is not None
        count = self.learned_scales if grows else len(self.areas)
        tokens = tokens[:, : sum(self.areas[:count])]
        terms = []
        for stream, logits in enumerate(self._logits(tokens, labels, null)):
            losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, :, stream], reduction="none").mean(0)
            if grows:
                weights = torch.ones_like(losses)
                weights[-self.areas[count - 1] :] = self.newest_weight
                losses = weights * losses
            terms.append(losses.sum() / self.token_layout.positions)
        return named_terms([term / len(terms) for term in terms])

    def logits(self, tokens: Tensor, labels: Tensor) -> list[Tensor]:
        """Logits of every token given the scales before its own (teacher forcing).

        Args:
            tokens: `(B, L, S)`, or the first scales; the last scale's are not read.
            labels: `(B,)` in `[0, classes]`, where `classes` is the null class.

        Returns:
            For each stream `(B, L, K)` float32.
        """
        return self._logits(tokens, labels, None)

    def sample(self, labels: Tensor, settings: SamplingSettings, indices: Tensor | None = None) -> Tensor:
        """Draw tokens `(B, L, S)` for labels `(B,)`, scale by scale with a cache.

        Guidance doubles the batch; VAR's own moves linearly over the scales. Sample i takes one uniform number per
        token, of `(seed, i, scale and stream, position)`.

        Args:
            labels: `(B,)` in `[0, classes)`, on the device of the model.
            settings: guidance, temperature, filters, of all streams or of each, and seed.
            indices: `(B,)`, the numbers of the samples within the run; by default 0, 1, ...

        Raises:
            UserError: a label out of range; guidance for a model that was trained without label dropout; settings for
                another number of streams; no tokenizer was attached.
        """
        return self.draw(labels, settings, indices).tokens

    def draw(
        self, labels: Tensor, settings: SamplingSettings, indices: Tensor | None = None, *, smooth: bool = False
    ) -> Drawn:
        """As `sample`, giving the latent too.

        Args:
            labels: as of `sample`.
            settings: as of `sample`.
            indices: as of `sample`.
            smooth: go on from mixtures of codes instead of the codes that were drawn (VAR's `more_smooth`, for one
                stream): images look smoother, and evaluate worse.

        Raises:
            UserError: as `sample`; smoothness for several streams.
        """
        check_labels(labels, self.classes)
        return self._drawn(labels, settings, indices, smooth, None)

    def edit(
        self,
        tokens: Tensor,
        mask: Tensor,
        labels: Tensor | None,
        settings: SamplingSettings,
        indices: Tensor | None = None,
        *,
        smooth: bool = False,
    ) -> Drawn:
        """Draw a part of given images anew (VAR, section 5.3): in-painting, out-painting, editing by class.

        Args:
            tokens: `(B, L, S)` of the images.
            mask: bool `(h, w)` over the last scale's grid, true where the images are kept, see
                `var_editing.inside_box`.
            labels: `(B,)` what the new part shall be; None for the null class, which leaves that to the images.
            settings: as of `sample`.
            indices: as of `sample`.
            smooth: as of `draw`.

        Raises:
            UserError: as `draw`; a mask of another grid; no labels for a model that was trained without label dropout.
        """
        kept = Kept(tokens, kept_positions(mask, self.token_layout).to(tokens.device))
        check_batch(tokens, labels, self.token_layout, self.classes)
        if labels is None:
            if self.options.label_dropout == 0:
                raise UserError("editing without labels needs a generator trained with label_dropout above 0")
            labels = torch.full((len(tokens),), self.classes, device=tokens.device)
        return self._drawn(labels, settings, indices, smooth, kept)

    def _drawn(
        self, labels: Tensor, settings: SamplingSettings, indices: Tensor | None, smooth: bool, kept: Kept | None
    ) -> Drawn:
        layout = self.token_layout
        if smooth and layout.streams > 1:
            raise UserError(f"smooth sampling mixes the codes of one stream, not of {layout.streams}")
        sampler = TokenSampler.start(
            settings, labels, indices, len(self.areas), layout.streams, self.options.label_dropout
        )
        with decoding(self, settings):
            drawn = self.decode(labels, sampler, smooth=smooth, kept=kept)
        # Tensors made in inference mode could not be trained on.
        return Drawn(drawn.tokens.clone(), drawn.latent.clone())

    def decode(self, labels: Tensor, sampler: TokenSampler, *, smooth: bool = False, kept: Kept | None = None) -> Drawn:
        """What `draw` and `edit` do, with a sampler that is given."""
        quantizer, rows = self.quantizer, sampler.twice(labels)
        condition = self.condition(rows, sampler.null_rows())
        modulations, final = self._modulations(condition)
        cache = self.transformer.new_cache(len(rows), self.token_layout.positions)
        tokens, total, inputs = [], None, condition + self.inputs.start
        for scale, positions in enumerate(self.inputs.places().split(self.areas)):
            hidden = self.transformer(inputs + positions, mask="none", cache=cache, modulations=modulations)
            logits = self._streams(hidden, final)
            progress = scale / max(len(self.areas) - 1, 1)
            drawn = torch.stack(
                [sampler.draw(part, scale, stream, progress) for stream, part in enumerate(logits)], dim=-1
            )
            codes = quantizer.codes(drawn, scale)
            if smooth:
                codes = smoothed_codes(quantizer, sampler, logits[0], scale, len(self.areas))
            if kept is not None:
                part, mask = (whole.split(self.areas, 1)[scale] for whole in (kept.tokens, kept.mask[None]))
                drawn = torch.where(mask[..., None], part, drawn)
                codes = torch.where(mask[..., None], quantizer.codes(part, scale), codes)
            tokens.append(drawn)
            total, following = quantizer.advance(total, codes, scale)
            if following is not None:
                inputs = sampler.twice(self.inputs.embedded(following))
        assert total is not None
        return Drawn(torch.cat(tokens, 1), total)

    def _logits(self, tokens: Tensor, labels: Tensor, null: Tensor | None) -> list[Tensor]:
        condition = self.condition(labels, null)
        modulations, final = self._modulations(condition)
        mask = BlockCausal(tuple(self.areas))
        return self._streams(
            self.transformer(self.inputs(tokens, condition), mask=mask, modulations=modulations), final
        )

    def _modulations(self, condition: Tensor) -> tuple[list[Tensor] | None, Tensor]:
        """What the class makes of the blocks, and of the norm before the output; once, whatever the tokens."""
        return self.transformer.modulations(condition), self.norm.modulation(condition).to(self.output.weight.dtype)

    def _streams(self, hidden: Tensor, final: Tensor) -> list[Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            logits = self.output(self.norm(hidden.to(final.dtype), final))
        return list(logits.float().split(self.token_layout.vocab, dim=-1))

    def _hold(self, quantizer: Quantizer) -> None:
        self.inputs.hold(quantizer)
        # What was built tells its options, so that it can be built again.
        self.options = self.options.model_copy(update={"quantizer": quantizer.options, "code_width": quantizer.dim})

    def _initialise(self) -> None:
        """VAR's start: gates near 0, output near 0, branches smaller the deeper the model."""
        options = self.options
        initialise(self, self.inputs.std)
        initialise_modulation(self, gates=options.gate_start, others=0.5)
        for name, weight in self.named_parameters():
            if name.endswith("modulation_table"):
                nn.init.normal_(weight, std=options.dim**-0.5)
                weight.data[:2] *= options.gate_start
                weight.data[2:] *= 0.5
            elif name.endswith(("attention.out.weight", "ffn.down.weight")):
                weight.data /= math.sqrt(2 * options.layers)
        self.output.weight.data *= 0.02
