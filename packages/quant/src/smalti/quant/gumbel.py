"""Gumbel-softmax quantization: the encoder names the code by a layer of logits (DALL-E, Ramesh et al. 2021; taming).

Legend: B batch, L token positions, D latent width, K codes, N = B * L.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from smalti.core.contracts import Quantized, Quantizer
from smalti.core.options import QuantizerOptions
from smalti.quant.entropy import affinity_entropy
from smalti.quant.estimators import gradient_of
from smalti.quant.inputs import as_tokens, check_token_space, checked_latent, float32_or_wider
from smalti.quant.softmax import best_code, expected_code


class GumbelOptions(QuantizerOptions):
    """Options of Gumbel-softmax quantization.

    Args:
        dim: D, width of the latent and of the codes.
        codebook_size: K.
        temperature: of the softmax whose gradient stands for that of the draw.
        final_temperature: what it falls to along half a cosine, 1/16 in DALL-E; null leaves it where it is.
        temperature_steps: training passes until then.
        kl_weight: of the divergence of a token's distribution over the codes from the uniform one, in nats.
    """

    name: Literal["gumbel"] = "gumbel"
    dim: Annotated[int, Field(ge=1)]
    codebook_size: Annotated[int, Field(ge=2)]
    temperature: Annotated[float, Field(gt=0)] = 1.0
    final_temperature: Annotated[float, Field(gt=0)] | None = None
    temperature_steps: Annotated[int, Field(ge=1)] = 150_000
    kl_weight: Annotated[float, Field(ge=0)] = 5e-4

    def build(self) -> GumbelQuantizer:
        """Build it."""
        return GumbelQuantizer(self)


class GumbelQuantizer(Quantizer):
    """In training a code drawn from softmax(logits), with the gradient of a Gumbel-softmax (Jang et al. 2017).

    In evaluation it is the code of the largest logit. (Taming's draws there, too.) The loss in training is `kl`:
    the mean over tokens of sum_k p_k log(K p_k), with p = softmax(logits), weighted.

    Attributes:
        logits: the linear layer from D to K; taming's is the same as a 1 x 1 convolution.
        codebook: `(K, D)`, a parameter.
        step: training passes so far, where the temperature falls.
    """

    options: GumbelOptions
    step: Tensor

    def __init__(self, options: GumbelOptions) -> None:
        super().__init__()
        self.options = options
        self.dim = options.dim
        self.vocab = (options.codebook_size,)
        self.logits = nn.Linear(options.dim, options.codebook_size)
        self.codebook = nn.Parameter(torch.randn(options.codebook_size, options.dim))
        if options.final_temperature is not None:
            # A buffer, so that a resumed run goes on as the unbroken one would have.
            self.register_buffer("step", torch.tensor(0))

    @property
    def temperature(self) -> Tensor | float:
        """That of the next training pass."""
        first, last = self.options.temperature, self.options.final_temperature
        if last is None:
            return first
        progress = (self.step / self.options.temperature_steps).clamp(max=1)
        return last + (first - last) * 0.5 * (1 + torch.cos(math.pi * progress))

    def forward(self, latent: Tensor) -> Quantized:
        """Quantize `(B, *space, D)`.

        Raises:
            UserError: another width than D, a type that is not float, an empty training batch.
        """
        with checked_latent(latent, self.dim, training=self.training) as vectors:
            flat, codebook = vectors.reshape(-1, self.dim), float32_or_wider(self.codebook)
            # Drawn from the global generator, as dropout is.
            noise_seed = torch.randint(2**62, ()) if self.training else None
            tokens = best_code(flat, self._logits, len(codebook), noise_seed=noise_seed)
            quantized, losses = F.embedding(tokens, codebook), {}
            if torch.is_grad_enabled() and len(flat):
                mean = expected_code(flat, codebook, self._logits, noise_seed=noise_seed, relaxation=self.temperature)
                quantized = quantized + gradient_of(mean, quantized.dtype)
            if self.training:
                kl = math.log(len(codebook)) - affinity_entropy(flat, self._logits, 1.0).sample
                losses["kl"] = self.options.kl_weight * kl
                if self.options.final_temperature is not None:
                    self.step += 1
            quantized = quantized.view(vectors.shape).to(self.codebook.dtype)
            return Quantized(quantized, as_tokens(tokens, latent), losses)

    def decode(self, tokens: Tensor, space: tuple[int, ...]) -> Tensor:
        """Codes `(B, *space, D)` of tokens `(B, L, 1)`.

        Raises:
            UserError: tokens of another shape or type, out of range, or that do not fill `space`.
        """
        check_token_space(tokens, space, self.vocab)
        return F.embedding(tokens, self.codebook).view(len(tokens), *space, self.dim)

    def _logits(self, vectors: Tensor) -> Tensor:
        weight, bias = float32_or_wider(self.logits.weight), float32_or_wider(self.logits.bias)
        return F.linear(vectors, weight, bias)
