"""What VAR's transformer reads: the class, then for every scale the latent of the scales before it.

Legend: B batch, L token positions, S streams, N positions of a scale, p_k area of scale k, D width of the model,
C width of the tokenizer's latent.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from smalti.core.contracts import Quantizer
from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout
from smalti.generation.transformer import initialise
from smalti.generation.var_training import Masking, drawn_mask


class ScaleInputs(nn.Module):
    """Words of scales: `latent so far, averaged down to the scale's grid`, through a linear layer, plus its place.

    Args:
        layout: of the tokens.
        dim: D.
        masking: of words in training.

    Attributes:
        areas: p_k of each scale.
        words: C to D, where C is known.
        quantizer: that of the tokenizer, frozen, where one is held.
    """

    words: nn.Linear
    quantizer: Quantizer
    masked_share: Tensor

    def __init__(self, layout: TokenLayout, dim: int, masking: Masking | None) -> None:
        super().__init__()
        self.areas = [math.prod(grid) for grid in layout.shape]
        self.masking = masking
        self.start = nn.Parameter(torch.empty(self.areas[0], dim))
        self.positions = nn.Parameter(torch.empty(layout.positions, dim))
        self.scales = nn.Embedding(len(self.areas), dim)
        if masking is not None:
            self.masked_word = nn.Parameter(torch.empty(dim))
            # Not a number, which would be a constant of a compiled forward pass.
            self.register_buffer("masked_share", torch.tensor(masking.bound(0)), persistent=False)
        self.std = math.sqrt(1 / (3 * dim))
        for weight in self.parameters():
            nn.init.normal_(weight, std=self.std)

    def begin_step(self, step: int) -> None:
        """Masking goes by the step."""
        if self.masking is not None:
            self.masked_share.fill_(self.masking.bound(step))

    def take_width(self, width: int) -> None:
        """Build `words` for a latent of that width, where there are none yet.

        Raises:
            UserError: there are some for another width.
        """
        if not hasattr(self, "words"):
            self.words = nn.Linear(width, self.positions.shape[1], device=self.positions.device)
            initialise(self.words, self.std)
        if self.words.in_features != width:
            raise UserError(
                f"this generator takes a latent {self.words.in_features} wide, the tokenizer's is {width} wide"
            )

    def hold(self, quantizer: Quantizer) -> None:
        """Make the quantizer a part of this module, frozen.

        Raises:
            UserError: a latent of another width, a quantizer that does not go from scale to scale.
        """
        self.take_width(quantizer.dim)
        quantizer = quantizer.to(self.positions.device)
        first = torch.zeros(1, 1, len(quantizer.vocab), dtype=torch.int64, device=self.positions.device)
        quantizer.codes(first, 0)  # raises where there are no scales
        self.quantizer = quantizer.requires_grad_(False).eval()

    def held(self) -> Quantizer:
        """The quantizer.

        Raises:
            UserError: there is none.
        """
        if not hasattr(self, "quantizer"):
            raise UserError("this var has no tokenizer yet: call attach(tokenizer) with the one whose tokens it models")
        return self.quantizer

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """The sequence `(B, L, D)` for teacher forcing.

        Args:
            tokens: `(B, L, S)` of all scales or of the first ones; those of the last are not read.
            condition: `(B, 1, D)`, the class.
        """
        parts = [condition + self.start]
        latents = self._latents(tokens)
        if latents is not None:
            parts.append(self._masked(self.embedded(latents)))
        sequence = torch.cat(parts, dim=1)
        return sequence + self.places()[: sequence.shape[1]]

    def places(self) -> Tensor:
        """What every position adds to its input, `(L, D)`."""
        repeats = torch.tensor(self.areas, device=self.positions.device)
        return self.positions + self.scales.weight.repeat_interleave(repeats, dim=0, output_size=len(self.positions))

    def embedded(self, latents: Tensor) -> Tensor:
        """The latent so far at the places of a scale, `(B, N, C)`, as words `(B, N, D)`."""
        # As the original: full precision where the sequence begins, and where it ends.
        with torch.autocast(latents.device.type, enabled=False):
            words: Tensor = self.words(latents.to(self.positions.dtype))
            return words

    @torch.no_grad()
    def _latents(self, tokens: Tensor) -> Tensor | None:
        """What the scales before each but the first amount to, `(B, L - p_0, C)`; None for the first scale alone."""
        quantizer = self.held()
        total, latents, start = None, [], 0
        for scale, area in enumerate(self.areas):
            part = tokens[:, start : start + area]
            start += area
            if start >= tokens.shape[1]:
                assert start == tokens.shape[1], f"{tokens.shape[1]} tokens do not end with a scale"
                break
            total, following = quantizer.advance(total, quantizer.codes(part, scale), scale)
            assert following is not None
            latents.append(following)
        return torch.cat(latents, dim=1) if latents else None

    def _masked(self, words: Tensor) -> Tensor:
        if self.masking is None or not self.training:
            return words
        masked = drawn_mask(words, self.masked_share)
        return torch.where(masked[..., None], self.masked_word.to(words.dtype), words)
