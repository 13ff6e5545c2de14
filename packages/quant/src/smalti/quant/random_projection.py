"""Random projection quantization: tokens as targets of self-supervised training (BEST-RQ, Chiu et al. 2022).

Nothing is learned and there is no way back from tokens, so it is not a `Quantizer`.

Legend: B batch, L token positions, S streams, D latent width, d code width, K codes of a stream.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.core.errors import UserError
from smalti.quant.inputs import checked_latent, float32_or_wider
from smalti.quant.lookup import nearest_code


class RandomProjectionQuantizer(nn.Module):
    """Latents through fixed random projections to the nearest of fixed random codes, by their cosine.

    Args:
        dim: D.
        codebook_size: K.
        codebook_dim: d.
        codebooks: S, each with a projection of its own.
        normalise: standardise the channels of every token first (LayerNorm without weights, eps 1e-5).

    Attributes:
        projections: `(S, d, D)`, Xavier-normal.
        biases: `(S, d)`, zero; converted weights of vector-quantize-pytorch bring others.
        codes: `(S, K, d)`, of unit length.

    Raises:
        UserError: a size below 1.
    """

    projections: Tensor
    biases: Tensor
    codes: Tensor

    def __init__(
        self, dim: int, codebook_size: int, codebook_dim: int, codebooks: int = 1, *, normalise: bool = True
    ) -> None:
        super().__init__()
        if min(dim, codebook_size, codebook_dim, codebooks) < 1:
            raise UserError(
                f"random projections need sizes of at least 1, got dim {dim}, codebook_size {codebook_size}, "
                f"codebook_dim {codebook_dim}, codebooks {codebooks}"
            )
        self.dim = dim
        self.vocab = (codebook_size,) * codebooks
        self.normalise = normalise
        deviation = math.sqrt(2 / (dim + codebook_dim))
        self.register_buffer("projections", deviation * torch.randn(codebooks, codebook_dim, dim))
        self.register_buffer("biases", torch.zeros(codebooks, codebook_dim))
        self.register_buffer("codes", F.normalize(torch.randn(codebooks, codebook_size, codebook_dim), dim=-1))

    @torch.no_grad()
    def forward(self, latent: Tensor) -> Tensor:
        """Tokens `(B, L, S)` of a latent `(B, *space, D)`; of equally near codes the first.

        Raises:
            UserError: another width than D, a type that is not float.
        """
        with checked_latent(latent, self.dim, training=False) as channels:
            streams = zip(self._projected(channels).unbind(-2), self.codes, strict=True)
            tokens = [nearest_code(some.flatten(0, 1), codes).view(some.shape[:2]) for some, codes in streams]
            return torch.stack(tokens, dim=-1)

    @torch.no_grad()
    def similarities(self, latent: Tensor) -> Tensor:
        """Cosines `(B, L, S, K)` between the projections of `(B, *space, D)` and all codes.

        Raises:
            UserError: as in `forward`.
        """
        with checked_latent(latent, self.dim, training=False) as channels:
            return torch.einsum("blsd,skd->blsk", self._projected(channels), float32_or_wider(self.codes))

    def _projected(self, latent: Tensor) -> Tensor:
        """Unit vectors `(B, L, S, d)`."""
        tokens = latent.flatten(1, -2)
        if self.normalise:
            tokens = F.layer_norm(tokens, (self.dim,))
        projected = torch.einsum("blw,sdw->blsd", tokens, float32_or_wider(self.projections))
        return F.normalize(projected + float32_or_wider(self.biases), dim=-1)
