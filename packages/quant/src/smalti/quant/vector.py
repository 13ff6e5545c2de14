"""Vector quantization: every token is the nearest code of a learned codebook (VQ-VAE, van den Oord et al. 2017).

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
from smalti.core.distributed import all_reduce_sum
from smalti.core.noise import mixed_seed
from smalti.core.options import QuantizerOptions
from smalti.quant.clusters import kmeans, shared_sample
from smalti.quant.ema import EmaStatistics
from smalti.quant.inputs import check_latent, check_token_space, float32_or_wider, full_precision
from smalti.quant.lookup import nearest_code
from smalti.quant.straight_through import straight_through

KMEANS_ITERATIONS = 10


class VectorQuantizerOptions(QuantizerOptions):
    """Options of vector quantization.

    Args:
        dim: D, width of the latent and of the codes.
        codebook_size: K.
        cosine: scale tokens and codes to unit length at every use (ViT-VQGAN section 3.2, LlamaGen).
        update: who moves the codes: `loss`, the optimizer by the codebook loss (VQ-VAE equation 3); `ema`,
            moving averages of the tokens (VQ-VAE appendix A.1).
        commitment_weight: of the mean squared distance that pulls tokens to their codes.
        codebook_weight: of the one that pulls codes to their tokens, where `update` is `loss`.
        ema_decay: weight of the past, where `update` is `ema`.
        initialise: `uniform` in [-1/K, 1/K]; `data`, by k-means over the first training batch.
        revive_after: replace a code that nothing was assigned to for this many training batches in a row by
            a random token; null leaves it alone.
    """

    name: Literal["vq"] = "vq"
    dim: Annotated[int, Field(ge=1)]
    codebook_size: Annotated[int, Field(ge=2)]
    cosine: bool = False
    update: Literal["loss", "ema"] = "loss"
    commitment_weight: Annotated[float, Field(ge=0)] = 0.25
    codebook_weight: Annotated[float, Field(ge=0)] = 1.0
    ema_decay: Annotated[float, Field(gt=0, lt=1)] = 0.99
    initialise: Literal["uniform", "data"] = "uniform"
    revive_after: Annotated[int, Field(ge=1)] | None = None

    def build(self) -> VectorQuantizer:
        """Build it."""
        return VectorQuantizer(self)


class VectorQuantizer(Quantizer):
    """Vector quantization with a straight-through gradient.

    The losses in training are `commitment`, mean (sg(e) - z)^2, and, where the optimizer moves the codes,
    `codebook`, mean (e - sg(z))^2, over all elements, weighted; z and e are of unit length with `cosine`.
    With `cosine` the latent it returns is of unit length, too.

    Attributes:
        codebook: `(K, D)`; a parameter where `update` is `loss`, else a buffer.
    """

    options: VectorQuantizerOptions
    codebook: Tensor
    step: Tensor
    initialised: Tensor
    unused: Tensor

    def __init__(self, options: VectorQuantizerOptions) -> None:
        super().__init__()
        self.options = options
        self.dim = options.dim
        size = options.codebook_size
        self.vocab = (size,)
        codebook = self._scaled(torch.empty(size, options.dim).uniform_(-1 / size, 1 / size))
        if options.update == "loss":
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
            self.ema = EmaStatistics(codebook, options.ema_decay)
        if options.initialise == "data":
            self.register_buffer("initialised", torch.tensor(False))
        if options.revive_after is not None:
            # Buffers, so that a resumed run counts on and draws what the unbroken one would have drawn.
            self.register_buffer("step", torch.tensor(0))
            self.register_buffer("unused", torch.zeros(size, dtype=torch.int64))

    def forward(self, latent: Tensor) -> Quantized:
        """Quantize `(B, *space, D)`.

        Raises:
            UserError: another width than D, a type that is not float, an empty training batch.
        """
        check_latent(latent, self.dim, training=self.training)
        with full_precision(latent):
            vectors = self._scaled(float32_or_wider(latent))
            flat = vectors.detach().reshape(-1, self.dim)
            if self.training:
                self._prepare(flat)
            tokens = nearest_code(flat, self._scaled(float32_or_wider(self.codebook.detach())))
            tokens = tokens.view(len(latent), math.prod(latent.shape[1:-1]), 1)
            codes = self._codes(tokens).view(vectors.shape)
            losses = {}
            if self.training:
                losses = self._losses(vectors, codes)
                self._learn(flat, tokens.flatten())
            return Quantized(straight_through(vectors, codes.to(self.codebook.dtype)), tokens, losses)

    def decode(self, tokens: Tensor, space: tuple[int, ...]) -> Tensor:
        """Codes `(B, *space, D)` of tokens `(B, L, 1)`.

        Raises:
            UserError: tokens of another shape or type, out of range, or that do not fill `space`.
        """
        check_token_space(tokens, space, self.vocab)
        with full_precision(tokens):
            return self._codes(tokens).to(self.codebook.dtype).view(len(tokens), *space, self.dim)

    def _scaled(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1, eps=1e-12) if self.options.cosine else vectors

    def _codes(self, tokens: Tensor) -> Tensor:
        # Rows first, then their scale: the backward pass keeps the rows and not the table, so that revival
        # may write to the table between a forward pass and its backward pass.
        return self._scaled(float32_or_wider(F.embedding(tokens, self.codebook)))

    def _losses(self, vectors: Tensor, codes: Tensor) -> dict[str, Tensor]:
        losses = {"commitment": self.options.commitment_weight * F.mse_loss(vectors, codes.detach())}
        if self.options.update == "loss":
            losses["codebook"] = self.options.codebook_weight * F.mse_loss(codes, vectors.detach())
        return losses

    @torch.no_grad()
    def _prepare(self, vectors: Tensor) -> None:
        """Before the search, so that new codes compete for the vectors they were made from."""
        size = self.options.codebook_size
        if self.options.initialise == "data" and not self.initialised:
            start = shared_sample(vectors, size, mixed_seed("vq", "initialise"))
            means = kmeans(vectors, start, KMEANS_ITERATIONS, cosine=self.options.cosine)
            self._replace(torch.arange(size, device=vectors.device), means)
            self.initialised.fill_(True)
        if self.options.revive_after is not None:
            dead = (self.unused >= self.options.revive_after).nonzero().flatten()
            if len(dead):
                self._replace(dead, shared_sample(vectors, len(dead), mixed_seed("vq", "revive", int(self.step))))
                self.unused[dead] = 0
            self.step += 1

    def _replace(self, rows: Tensor, codes: Tensor) -> None:
        # An optimizer with momentum still holds the averages of the old rows. They were decaying, since a
        # code that is not used has no gradient, and a revived row drifts by what is left of them.
        self.codebook[rows] = codes.to(self.codebook.dtype)
        if self.options.update == "ema":
            self.ema.restart(rows, codes)

    @torch.no_grad()
    def _learn(self, vectors: Tensor, tokens: Tensor) -> None:
        """After the search: the codes that this step returns are those from before the update."""
        if self.options.update == "ema":
            self.codebook.copy_(self._scaled(self.ema.update(tokens, vectors)))
        if self.options.revive_after is not None:
            hits = all_reduce_sum(torch.bincount(tokens, minlength=self.options.codebook_size))
            self.unused.copy_(torch.where(hits > 0, 0, self.unused + 1))
