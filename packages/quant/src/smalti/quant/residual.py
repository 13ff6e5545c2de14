"""Residual quantization: every level quantizes what the levels before it have left (RQ-VAE, Lee et al. 2022).

Legend: B batch, L token positions, S streams, D latent width, Q levels.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from smalti.core.contracts import Quantized, Quantizer
from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout
from smalti.core.options import QuantizerOptions
from smalti.quant.beam_search import beam_search
from smalti.quant.estimators import diveq, straight_through
from smalti.quant.inputs import check_tokens, checked_latent, float32_or_wider, full_precision
from smalti.quant.level_dropout import drawn_levels
from smalti.quant.units import Unit, Units, joined_layout, learning_once, searched, summed, touched
from smalti.quant.vector import VectorQuantizer

Positive = Annotated[float, Field(gt=0)]


class ResidualOptions(QuantizerOptions):
    """Options of residual quantization.

    Args:
        quantizers: the units of the levels, of one width.
        depth: repeat the row of units so many times.
        shared: one unit, with one codebook, for all levels; its statistics are updated once per step.
        gradient: `once` passes the gradient of the sum straight to the latent (RQ-VAE); `levels`
            adds up what the units pass, as vector-quantize-pytorch does: with Q straight-through units that
            is Q times as much. Units that learn through their output (projected, ibq) need `levels`. `diveq` moves
            the latent towards the sum, see `smalti.quant.estimators.diveq`, from which all codes learn: units need no
            codebook loss.
        diveq_variance: of the noise of `diveq`, in training.
        quant_grad_frac: share of the gradient that the subtracted codes keep; 1 and `levels` together give
            the identity, too.
        level_scale: level l, from 0, quantizes the residual divided by level_scale^l; per channel where a list.
        clamp: squash the latent x to c tanh(x/c) first, within (-c, c); per channel where a list.
        dropout_from: in training keep only the first n levels, n uniform between this and Q, the same on all
            processes (SoundStream, section III-C); null keeps all. What is left out is not computed, so that
            torch.compile breaks its graph there.
        dropout_multiple: round n up to a multiple of this.
        beams: how many paths through the levels a beam search follows, see `beam_search`; 1 takes the nearest
            code at each level. More need `vq` units of one scale.
        eval_beams: as many in evaluation; null takes `beams`.
    """

    name: Literal["residual"] = "residual"
    quantizers: Annotated[tuple[Unit, ...], Field(min_length=1)]
    depth: Annotated[int, Field(ge=1)] = 1
    shared: bool = False
    gradient: Literal["once", "levels", "diveq"] = "once"
    diveq_variance: Annotated[float, Field(ge=0)] = 5e-3
    quant_grad_frac: Annotated[float, Field(ge=0, le=1)] = 0.0
    level_scale: Positive | tuple[Positive, ...] = 1.0
    clamp: Positive | tuple[Positive, ...] | None = None
    dropout_from: Annotated[int, Field(ge=1)] | None = None
    dropout_multiple: Annotated[int, Field(ge=1)] = 1
    beams: Annotated[int, Field(ge=1)] = 1
    eval_beams: Annotated[int, Field(ge=1)] | None = None

    def build(self) -> Residual:
        """Build it."""
        return Residual(self)


class Residual(Quantizer):
    """A stack of units; the latent is the sum of what they give, and streams are in the order of levels.

    Losses are summed over the levels (RQ-VAE). Levels that dropout leaves out neither learn nor
    add losses; their tokens are still searched, so that all tokens are valid. `decode` takes the tokens of
    the first levels alone as well.

    Attributes:
        units: one per level, or with `shared` one for all.
    """

    options: ResidualOptions
    step: Tensor

    def __init__(self, options: ResidualOptions) -> None:
        super().__init__()
        self.options = options
        self.units = Units(options.quantizers, options.depth, shared=options.shared)
        widths = sorted({unit.dim for unit in self.units.row()})
        if len(widths) > 1:
            raise UserError(f"the units of a residual quantizer need one width, got {widths}")
        self.dim = widths[0]
        self.vocab = tuple(size for unit in self.units.row() for size in unit.vocab)
        for name in ("level_scale", "clamp"):
            value = getattr(options, name)
            if isinstance(value, tuple) and len(value) != self.dim:
                raise UserError(f"{name} needs one number per channel, {self.dim}, got {len(value)}")
        if options.gradient == "diveq" and any(
            getattr(unit.options, "update", "loss") != "loss" for unit in self.units
        ):
            raise UserError("gradient: diveq moves the codes by their gradient: the units need update: loss")
        searches = max(options.beams, options.eval_beams or 1) > 1
        if searches and not all(isinstance(unit, VectorQuantizer) for unit in self.units):
            raise UserError("beam search needs vq units: set beams to 1")
        if searches and options.level_scale != 1.0:
            raise UserError(f"beam search needs levels of one scale, got level_scale {options.level_scale}")
        if options.dropout_from is not None:
            if options.dropout_from > self.units.places:
                raise UserError(f"dropout_from is {options.dropout_from}, but there are {self.units.places} levels")
            # A buffer, so that a resumed run draws what the unbroken one would have drawn.
            self.register_buffer("step", torch.tensor(0))

    def forward(self, latent: Tensor) -> Quantized:
        """Quantize `(B, *space, D)`.

        Raises:
            UserError: another width than D, a type that is not float, an empty training batch.
        """
        options = self.options
        checked = checked_latent(latent, self.dim, training=self.training)
        with checked as vectors, learning_once(self.units[0]) if options.shared else nullcontext():
            kept = self.kept_levels() if self.training else self.units.places
            start = rest = self._clamped(vectors)
            paths = self._paths(start, kept)
            latents, tokens, losses = [], [], []
            idle: Tensor | float = 0.0
            for level, unit in enumerate(self.units.row()):
                inputs = self._scaled(rest, -level)
                given = () if paths is None else (paths[..., level : level + 1],)
                quantized: Quantized = unit(inputs, *given) if level < kept else searched(unit, inputs)
                if options.gradient == "diveq":
                    # A unit passes its gradient to what it got; here it goes to the codes.
                    quantized = quantized._replace(latent=unit.decode(quantized.tokens, latent.shape[1:-1]))
                codes = self._scaled(quantized.latent, level)
                tokens.append(quantized.tokens)
                losses.append(quantized.losses)
                if level < kept:
                    latents.append(codes)
                else:
                    idle = idle + touched(unit)
                taken = codes.detach()
                rest = rest - (taken.lerp(codes, options.quant_grad_frac) if options.quant_grad_frac else taken)
            total = self._estimate(start, _sum(latents))
            return Quantized(total + idle if kept < self.units.places else total, torch.cat(tokens, -1), summed(losses))

    def decode(self, tokens: Tensor, space: tuple[int, ...]) -> Tensor:
        """Latent `(B, *space, D)` of the tokens `(B, L, S)` of all levels, or of the first ones.

        Raises:
            UserError: tokens of another shape or type, out of range, or that do not fill `space`.
        """
        units: list[Quantizer] = []
        while len(units) < self.units.places and sum(len(unit.vocab) for unit in units) < max(tokens.shape[-1], 1):
            units.append(self.units.row()[len(units)])
        streams = [len(unit.vocab) for unit in units]
        check_tokens(tokens, self.vocab[: sum(streams)])
        with full_precision(tokens):
            parts = zip(units, tokens.split(streams, -1), strict=True)
            return _sum([self._scaled(unit.decode(part, space), level) for level, (unit, part) in enumerate(parts)])

    def layout(self, space: tuple[int, ...]) -> TokenLayout:
        """The units' positions, with the streams of all levels."""
        return joined_layout(self.units.row(), space)

    def kept_levels(self) -> int:
        """How many levels this training step keeps."""
        start = self.options.dropout_from
        if start is None:
            return self.units.places
        drawn = drawn_levels(int(self.step), start, self.units.places, self.options.dropout_multiple)
        self.step += 1
        return drawn

    def _estimate(self, start: Tensor, total: Tensor) -> Tensor:
        match self.options.gradient:
            case "once":
                return straight_through(start, total)
            case "diveq":
                return diveq(start, total, self.options.diveq_variance if self.training else 0.0)
            case "levels":
                return total

    def _paths(self, latent: Tensor, kept: int) -> Tensor | None:
        """Tokens `(B, L, n)` of the first n levels where they are not searched level by level."""
        options = self.options
        beams = options.beams if self.training else options.eval_beams or options.beams
        if beams == 1:
            return None
        units = [cast("VectorQuantizer", unit) for unit in self.units.row()]
        # The first batch makes the codes of a level out of what the levels before it leave of that batch.
        if self.training and not all(getattr(unit.learning, "initialised", True) for unit in units):
            return None
        return beam_search(units[:kept], latent, beams)

    def _scaled(self, value: Tensor, power: int) -> Tensor:
        scale = self.options.level_scale
        if scale == 1.0 or power == 0:
            return value
        if isinstance(scale, tuple):
            return value * value.new_tensor([number**power for number in scale])
        return value * scale**power

    def _clamped(self, latent: Tensor) -> Tensor:
        clamp = self.options.clamp
        if clamp is None:
            return latent
        bound = latent.new_tensor(clamp)
        return bound * torch.tanh(latent / bound)


def _sum(latents: list[Tensor]) -> Tensor:
    """The sum in the order of levels, computed in float32; forward and decode must round alike."""
    total = float32_or_wider(latents[0])
    for latent in latents[1:]:
        total = total + latent
    return total.to(latents[0].dtype)
