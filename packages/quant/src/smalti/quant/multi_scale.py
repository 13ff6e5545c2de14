"""Multi-scale residual quantization: every level is a coarser or finer picture of the residual (VAR, Tian et al. 2024).

Legend: B batch, L token positions, S streams, D latent width, h w latent grid, K scales, p_k area of scale k.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from smalti.core.contracts import Quantized, Quantizer
from smalti.core.distributed import rank
from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout
from smalti.core.options import QuantizerOptions
from smalti.quant.estimators import straight_through
from smalti.quant.inputs import check_tokens, checked_latent, float32_or_wider, full_precision
from smalti.quant.level_dropout import drawn_scales
from smalti.quant.phi import Phi, phi_of_scale
from smalti.quant.units import Unit, Units, learning_once, summed

Side = Annotated[int, Field(ge=1)]


class MultiScaleOptions(QuantizerOptions):
    """Options of multi-scale residual quantization.

    Args:
        quantizer: the unit. VAR's is `vq`, XQ-GAN's a `vq` that searches by cosine, or a lookup-free one.
        shared: one unit, with one codebook, for all scales; its statistics are updated once per step.
        scales: grids, coarse to fine, `[h, w]` or one number for a square; the last is the latent's.
        phi: number of phi convolutions: K for one per scale, 1 for a shared one, 0 for none, 4 in VAR.
        phi_ratio: r, the share of the convolution in phi.
        phi_rule: which convolution a scale uses, see `phi_of_scale`.
        enlargement: of a scale's codes to the latent's size.
        scale_decay: scale k, from 0, quantizes the residual divided by scale_decay^k (XQ-GAN's `scale`).
        normalise: scale the latent's vectors to unit length first (XQ-GAN with BSQ).
        commitment_weight: of the mean squared distance that pulls the latent to what the first scales make of
            it, averaged over scales.
        codebook_weight: of the one that pulls codes and phi to the latent.
        dropout: share of the samples, the first of each batch, that keep in training only their first n
            scales, n drawn uniformly for each (ImageFolder).
        dropout_start: the smallest n.
    """

    name: Literal["multi-scale"] = "multi-scale"
    quantizer: Unit
    shared: bool = True
    scales: Annotated[tuple[tuple[Side, Side], ...], Field(min_length=1)]
    phi: Annotated[int, Field(ge=0)] = 4
    phi_ratio: Annotated[float, Field(gt=0, le=1)] = 0.5
    phi_rule: Literal["ticks", "rounded"] = "ticks"
    enlargement: Literal["bicubic", "bilinear"] = "bicubic"
    scale_decay: Annotated[float, Field(gt=0)] = 1.0
    normalise: bool = False
    commitment_weight: Annotated[float, Field(ge=0)] = 0.25
    codebook_weight: Annotated[float, Field(ge=0)] = 1.0
    dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    dropout_start: Annotated[int, Field(ge=1)] = 1

    @field_validator("scales", mode="before")
    @classmethod
    def _squares(cls, scales: object) -> object:
        if isinstance(scales, list | tuple):
            return tuple((side, side) if isinstance(side, int) else side for side in scales)
        return scales

    def build(self) -> MultiScale:
        """Build it."""
        return MultiScale(self)


class MultiScale(Quantizer):
    """The residual is averaged down to each scale in turn, quantized, enlarged, smoothed by phi, and subtracted.

    The latent passes its gradient straight through the whole; codes and phi learn by the `codebook` loss. In
    training the losses are those of VAR's equation 5 over the K partial sums f_k: `commitment`, the mean of
    (sg(f_k) - f)^2, and `codebook`, of (f_k - sg(f))^2, over the kept scales of the samples. They stand for
    the unit's terms of these names; further terms of the unit (entropy) are averaged over scales.

    Attributes:
        units: one for all scales, or without `shared` one per scale.
        phi: the convolutions.
        phi_of_scale: which of them each scale uses.
    """

    options: MultiScaleOptions
    step: Tensor

    def __init__(self, options: MultiScaleOptions) -> None:
        super().__init__()
        self.options = options
        count = len(options.scales)
        if options.phi > count:
            raise UserError(f"phi is {options.phi}, but there are {count} scales")
        if options.dropout_start > count:
            raise UserError(f"dropout_start is {options.dropout_start}, but there are {count} scales")
        self.units = Units((options.quantizer,), count, shared=options.shared)
        unit = self.units.row()[0]
        self.dim, self.vocab = unit.dim, unit.vocab
        self.phi = nn.ModuleList(Phi(self.dim, options.phi_ratio) for _ in range(options.phi))
        self.phi_of_scale = phi_of_scale(count, options.phi, options.phi_rule) if options.phi else ()
        self.areas = [height * width for height, width in options.scales]
        if options.dropout > 0:
            # A buffer, so that a resumed run draws what the unbroken one would have drawn.
            self.register_buffer("step", torch.tensor(0))

    def forward(self, latent: Tensor) -> Quantized:
        """Quantize `(B, h, w, D)`.

        Raises:
            UserError: another width than D, another grid than that of the last scale, a type that is not
                float, an empty training batch.
        """
        checked = checked_latent(latent, self.dim, training=self.training)
        with checked as vectors, learning_once(self.units):
            self._check_space(tuple(latent.shape[1:-1]))
            whole = F.normalize(vectors, dim=-1) if self.options.normalise else vectors
            whole = rest = whole.movedim(-1, 1)
            total = torch.zeros_like(whole)
            keep = self._keep(whole) if self.training else None
            tokens, losses = [], []
            for scale, (unit, grid) in enumerate(zip(self.units.row(), self.options.scales, strict=True)):
                weight = self.options.scale_decay**scale
                quantized: Quantized = unit(F.adaptive_avg_pool2d(rest, grid).movedim(1, -1) / weight)
                codes = self._enlarged(self.codes(quantized.tokens, scale), scale)
                rest = rest - codes.detach()
                total = total + (codes if keep is None else codes * keep[scale])
                tokens.append(quantized.tokens)
                if self.training:
                    losses.append(self._losses(whole, total, quantized.losses, None if keep is None else keep[scale]))
            output = straight_through(whole, total).movedim(1, -1)
            averaged = {name: loss / len(self.areas) for name, loss in summed(losses).items()}
            return Quantized(output, torch.cat(tokens, 1), averaged)

    def decode(self, tokens: Tensor, space: tuple[int, ...]) -> Tensor:
        """Latent `(B, h, w, D)` of the tokens `(B, L, S)` of all scales, or of the first ones.

        Raises:
            UserError: another grid than that of the last scale; tokens of another shape or type, out of
                range, or that do not end with a scale.
        """
        self._check_space(space)
        *_, last = self.partial_sums(tokens)
        return last

    def partial_sums(self, tokens: Tensor) -> Iterator[Tensor]:
        """The latents `(B, h, w, D)` after every scale that the tokens `(B, L, S)` have, coarse to fine."""
        total: Tensor | None = None
        for scale, part in enumerate(self._parts(tokens)):
            total, _ = self.advance(total, self.codes(part, scale), scale)
            yield total

    def codes(self, tokens: Tensor, scale: int) -> Tensor:
        """The vectors `(B, N, D)` of tokens `(B, N, S)` of scale k, before they are enlarged."""
        with full_precision(tokens):
            decoded = self.units.row()[scale].decode(tokens, (tokens.shape[1],))
            return float32_or_wider(decoded) * self.options.scale_decay**scale

    def advance(self, total: Tensor | None, codes: Tensor, scale: int) -> tuple[Tensor, Tensor | None]:
        """The latent `(B, h, w, D)` after scale k, whose codes are `(B, p_k, D)`, and the input of the next scale."""
        with full_precision(codes):
            enlarged = self._enlarged(codes, scale)
            after = enlarged if total is None else total.movedim(-1, 1) + enlarged
            following = None
            if scale + 1 < len(self.areas):
                grid = self.options.scales[scale + 1]
                following = F.adaptive_avg_pool2d(after, grid).flatten(2).transpose(1, 2)
            return after.movedim(1, -1), following

    def layout(self, space: tuple[int, ...]) -> TokenLayout:
        """The scales."""
        self._check_space(space)
        return TokenLayout.scales(self.options.scales, self.vocab)

    def kept_scales(self, batch: int) -> Tensor:
        """With `dropout`: how many scales each of `batch` samples keeps in this training step, int64 `(B,)`."""
        options = self.options
        scales = len(self.areas)
        kept: Tensor = drawn_scales(self.step, batch, options.dropout, options.dropout_start, scales, rank())
        self.step += 1
        return kept

    def _keep(self, latent: Tensor) -> Tensor | None:
        """Masks `(K, B, 1, 1, 1)`, 1 where a sample keeps a scale."""
        if self.options.dropout == 0:
            return None
        kept = self.kept_scales(len(latent)).to(latent.device)
        mask = torch.arange(len(self.areas), device=latent.device)[:, None] < kept
        return mask.to(latent.dtype)[..., None, None, None]

    def _enlarged(self, codes: Tensor, scale: int) -> Tensor:
        """The codes `(B, p_k, D)` of one scale as `(B, D, h, w)`, with gradients to codes and phi."""
        options = self.options
        grid = codes.unflatten(1, options.scales[scale]).movedim(-1, 1)
        if options.scales[scale] != options.scales[-1]:
            grid = F.interpolate(grid, options.scales[-1], mode=options.enlargement, align_corners=False)
        smoothed: Tensor = self.phi[self.phi_of_scale[scale]](grid) if options.phi else grid
        return smoothed

    def _losses(self, latent: Tensor, total: Tensor, unit: dict[str, Tensor], keep: Tensor | None) -> dict[str, Tensor]:
        def distance(first: Tensor, second: Tensor) -> Tensor:
            squares = (first - second).square()
            if keep is None:
                return squares.mean()
            return (squares * keep).mean() / keep.mean().clamp(min=1 / (2 * len(keep)))

        losses = {name: loss for name, loss in unit.items() if name not in ("commitment", "codebook")}
        losses["commitment"] = self.options.commitment_weight * distance(latent, total.detach())
        losses["codebook"] = self.options.codebook_weight * distance(total, latent.detach())
        return losses

    def _parts(self, tokens: Tensor) -> list[Tensor]:
        check_tokens(tokens, self.vocab)
        areas: list[int] = []
        while len(areas) < len(self.areas) and sum(areas) < max(tokens.shape[1], 1):
            areas.append(self.areas[len(areas)])
        if tokens.shape[1] != sum(areas):
            ends = ", ".join(str(sum(self.areas[: index + 1])) for index in range(len(self.areas)))
            raise UserError(f"tokens of scales must end with one, after {ends} positions, got {tokens.shape[1]}")
        return list(tokens.split(areas, 1))

    def _check_space(self, space: tuple[int, ...]) -> None:
        if tuple(space) != self.options.scales[-1]:
            raise UserError(f"the latent space must be that of the last scale, {self.options.scales[-1]}, got {space}")
