"""SimVQ: a frozen random codebook behind one learned linear map, which moves all codes at once (Zhu et al. 2024).

Legend: B batch, L token positions, D latent width, d width of the frozen codebook, K codes.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from smalti.core.contracts import Quantized, Quantizer
from smalti.core.options import QuantizerOptions
from smalti.quant.estimators import rotation_trick, straight_through
from smalti.quant.inputs import as_tokens, check_token_space, checked_latent, float32_or_wider, full_precision
from smalti.quant.lookup import nearest_code


class SimVQOptions(QuantizerOptions):
    """Options of SimVQ.

    Args:
        dim: D, width of the latent and of the codes.
        codebook_size: K.
        frozen_dim: d, width of the frozen codebook; null takes D.
        bias: of the linear map.
        estimator: of the gradient: `straight-through`, or `rotation`, the rotation trick.
        commitment_weight: of the mean squared distance that pulls tokens to their codes.
        codebook_weight: of the one that pulls codes to their tokens.
    """

    name: Literal["simvq"] = "simvq"
    dim: Annotated[int, Field(ge=1)]
    codebook_size: Annotated[int, Field(ge=2)]
    frozen_dim: Annotated[int, Field(ge=1)] | None = None
    bias: bool = False
    estimator: Literal["straight-through", "rotation"] = "straight-through"
    commitment_weight: Annotated[float, Field(ge=0)] = 0.25
    codebook_weight: Annotated[float, Field(ge=0)] = 1.0

    def build(self) -> SimVQ:
        """Build it."""
        return SimVQ(self)


class SimVQ(Quantizer):
    """Vector quantization whose codes are `transform(frozen)`.

    The losses in training are those of vector quantization: `commitment`, mean (sg(e) - z)^2, and `codebook`,
    mean (e - sg(z))^2, weighted.

    Attributes:
        frozen: `(K, d)`, normal with variance 1/d; never changes.
        transform: the linear map from d to D.
    """

    options: SimVQOptions
    frozen: Tensor

    def __init__(self, options: SimVQOptions) -> None:
        super().__init__()
        self.options = options
        self.dim = options.dim
        self.vocab = (options.codebook_size,)
        width = options.dim if options.frozen_dim is None else options.frozen_dim
        self.register_buffer("frozen", torch.randn(options.codebook_size, width) / width**0.5)
        self.transform = nn.Linear(width, options.dim, bias=options.bias)

    def forward(self, latent: Tensor) -> Quantized:
        """Quantize `(B, *space, D)`.

        Raises:
            UserError: another width than D, a type that is not float, an empty training batch.
        """
        with checked_latent(latent, self.dim, training=self.training) as vectors:
            table = self._table()
            tokens = nearest_code(vectors.detach().reshape(-1, self.dim), table.detach())
            codes = F.embedding(tokens, table).view(vectors.shape)
            losses = {}
            if self.training:
                losses["commitment"] = self.options.commitment_weight * F.mse_loss(vectors, codes.detach())
                losses["codebook"] = self.options.codebook_weight * F.mse_loss(codes, vectors.detach())
            estimate = rotation_trick if self.options.estimator == "rotation" else straight_through
            quantized = estimate(vectors, codes).to(self.frozen.dtype)
            return Quantized(quantized, as_tokens(tokens, latent), losses)

    def decode(self, tokens: Tensor, space: tuple[int, ...]) -> Tensor:
        """Codes `(B, *space, D)` of tokens `(B, L, 1)`.

        Raises:
            UserError: tokens of another shape or type, out of range, or that do not fill `space`.
        """
        check_token_space(tokens, space, self.vocab)
        with full_precision(tokens):
            return F.embedding(tokens, self._table()).to(self.frozen.dtype).view(len(tokens), *space, self.dim)

    def _table(self) -> Tensor:
        # The whole of it, also to decode: a row's bits must not depend on how many rows are asked for.
        weight, bias = self.transform.weight, self.transform.bias
        return F.linear(
            float32_or_wider(self.frozen), float32_or_wider(weight), None if bias is None else float32_or_wider(bias)
        )
