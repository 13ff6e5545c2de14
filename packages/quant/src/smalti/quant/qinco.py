"""Residual quantization whose codebooks depend on what was decoded so far (QINCo, Huijben et al. 2024).

Legend: B batch, L token positions, D latent width, K codes, Q levels, N = B * L.
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
from smalti.quant.estimators import rotation_trick, straight_through
from smalti.quant.inputs import as_tokens, check_token_space, checked_latent, float32_or_wider, full_precision
from smalti.quant.units import summed

# Elements of the codes of one block of tokens; a few arrays of this size live at once.
BLOCK = 1 << 22


class ImplicitCodebooksOptions(QuantizerOptions):
    """Options of residual quantization with implicit neural codebooks.

    Args:
        dim: D, width of the latent and of the codes.
        codebook_size: K of every level.
        depth: Q.
        hidden: width within the blocks of the networks; null takes D.
        blocks: of each network.
        gradient: `once` passes the gradient of the sum straight to the latent; `levels` adds up what every
            level's estimator passes, as vector-quantize-pytorch does.
        estimator: of a level's gradient, where `gradient` is `levels`.
        commitment_weight: of the mean squared distance that pulls residuals to their codes, summed over levels.
        codebook_weight: of the one that pulls codes to their residuals.
    """

    name: Literal["qinco"] = "qinco"
    dim: Annotated[int, Field(ge=1)]
    codebook_size: Annotated[int, Field(ge=2)]
    depth: Annotated[int, Field(ge=1)]
    hidden: Annotated[int, Field(ge=1)] | None = None
    blocks: Annotated[int, Field(ge=0)] = 4
    gradient: Literal["once", "levels"] = "once"
    estimator: Literal["straight-through", "rotation"] = "straight-through"
    commitment_weight: Annotated[float, Field(ge=0)] = 0.25
    codebook_weight: Annotated[float, Field(ge=0)] = 1.0

    def build(self) -> ImplicitCodebooks:
        """Build it."""
        return ImplicitCodebooks(self)


class CodeNetwork(nn.Module):
    """A code, given the sum of the codes before it: one linear layer, then residual blocks (QINCo)."""

    def __init__(self, dim: int, hidden: int, blocks: int) -> None:
        super().__init__()
        self.project = nn.Linear(2 * dim, dim)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, dim)) for _ in range(blocks)
        )

    def forward(self, decoded: Tensor, code: Tensor) -> Tensor:
        """The code `(..., D)` of the base code `(..., D)` after the sum `(..., D)`."""
        value: Tensor = self.project(torch.cat(torch.broadcast_tensors(decoded, code), -1))
        for block in self.blocks:
            value = value + block(value)
        return value


class ImplicitCodebooks(Quantizer):
    """Level 1 has a codebook; the codes of later levels come out of a network that also sees the sum so far.

    Codes and networks learn by the `codebook` loss. `decode` takes the tokens of the first levels alone as well.

    Attributes:
        codebooks: `(Q, K, D)`, base codes.
        networks: those of levels 2 to Q.
    """

    options: ImplicitCodebooksOptions

    def __init__(self, options: ImplicitCodebooksOptions) -> None:
        super().__init__()
        self.options = options
        self.dim = options.dim
        self.vocab = (options.codebook_size,) * options.depth
        shape = (options.depth, options.codebook_size, options.dim)
        self.codebooks = nn.Parameter(torch.randn(shape) / math.sqrt(options.dim))
        hidden = options.hidden or options.dim
        self.networks = nn.ModuleList(
            CodeNetwork(options.dim, hidden, options.blocks) for _ in range(options.depth - 1)
        )

    def forward(self, latent: Tensor) -> Quantized:
        """Quantize `(B, *space, D)`.

        Raises:
            UserError: another width than D, a type that is not float, an empty training batch.
        """
        options = self.options
        with checked_latent(latent, self.dim, training=self.training) as vectors:
            start = rest = vectors.reshape(-1, self.dim)
            total, output, tokens, losses = torch.zeros_like(rest), torch.zeros_like(rest), [], []
            for level in range(options.depth):
                tokens.append(self._search(rest, total, level))
                codes = self._codes(tokens[-1], output if options.gradient == "levels" else total, level)
                if self.training:
                    losses.append(
                        {
                            "commitment": options.commitment_weight * F.mse_loss(rest, codes.detach()),
                            "codebook": options.codebook_weight * F.mse_loss(codes, rest.detach()),
                        }
                    )
                estimate = rotation_trick if options.estimator == "rotation" else straight_through
                output = output + estimate(rest, codes)
                total = total + codes.detach()
                rest = rest - codes.detach()
            if options.gradient == "once":
                output = straight_through(start, total)
            joined = as_tokens(torch.stack(tokens, -1), latent, options.depth)
            return Quantized(output.view(latent.shape), joined, summed(losses))

    def decode(self, tokens: Tensor, space: tuple[int, ...]) -> Tensor:
        """Latent `(B, *space, D)` of the tokens `(B, L, S)` of all levels, or of the first ones.

        Raises:
            UserError: tokens of another shape or type, out of range, or that do not fill `space`.
        """
        check_token_space(tokens, space, self.vocab[: max(tokens.shape[-1], 1)])
        with full_precision(tokens):
            total = float32_or_wider(self.codebooks).new_zeros(math.prod(tokens.shape[:2]), self.dim)
            for level, some in enumerate(tokens.flatten(0, 1).unbind(-1)):
                total = total + self._codes(some, total, level)
            return total.view(len(tokens), *space, self.dim)

    def _codes(self, tokens: Tensor, total: Tensor, level: int) -> Tensor:
        """The codes `(N, D)` of one level's tokens `(N,)` after the sums `(N, D)`."""
        base = F.embedding(tokens, self.codebooks[level])
        return float32_or_wider(base if level == 0 else self._network(level, total, base))

    def _network(self, level: int, total: Tensor, base: Tensor) -> Tensor:
        code: Tensor = self.networks[level - 1](total.to(base.dtype), base)
        return code

    @torch.no_grad()
    def _search(self, rest: Tensor, total: Tensor, level: int) -> Tensor:
        """The nearest of each token's own K codes, int64 `(N,)`, a block of tokens at a time."""
        size = self.options.codebook_size
        rows = max(1, BLOCK // (size * self.dim))
        nearest = []
        for some, sums in zip(rest.split(rows), total.split(rows), strict=True):
            codes = self.codebooks[level].expand(len(some), size, self.dim)
            if level > 0:
                codes = self._network(level, sums[:, None], codes)
            nearest.append((some[:, None] - codes).square().sum(-1).argmin(-1))
        return torch.cat(nearest)
