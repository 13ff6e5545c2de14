"""The transformer of LlamaGen (Sun et al. 2024): pre-norm blocks of causal attention and a gated feed-forward.

The same code trains on whole sequences and decodes with a cache.

Legend: B batch, T positions, H heads, d width of a head, D width of the model (D = H d).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from smalti.core.options import GeneratorOptions
from smalti.generation.attention import attend
from smalti.generation.cache import LayerCache, allocate
from smalti.generation.rotary import rotate

NORM_EPSILON = 1e-5
INITIAL_STD = 0.02


class TransformerOptions(GeneratorOptions):
    """What generators on this transformer have in common.

    Args:
        layers: blocks.
        dim: width of the model.
        heads: of attention; their width, dim / heads, must be divisible by 4.
        ffn_multiple: the feed-forward is 8/3 dim wide, rounded up to a multiple of this.
        dropout: of the input sequence and after both branches of every block.
        drop_path: chance to leave out a branch of the last block, per sample, rising linearly from 0 at the first
            (stochastic depth, Huang et al. 2016).
    """

    layers: Annotated[int, Field(ge=1)] = 12
    dim: Annotated[int, Field(ge=4)] = 768
    heads: Annotated[int, Field(ge=1)] = 12
    ffn_multiple: Annotated[int, Field(ge=1)] = 256
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @field_validator("heads")
    @classmethod
    def _fits_dim(cls, heads: int, info: ValidationInfo) -> int:
        dim = info.data.get("dim")
        if dim is not None and dim % (4 * heads):
            raise ValueError(f"dim {dim} must be a multiple of 4 times the number of heads")
        return heads

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.dim // self.heads

    @property
    def ffn_dim(self) -> int:
        """Width of the feed-forward."""
        return -(-(8 * self.dim // 3) // self.ffn_multiple) * self.ffn_multiple


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019) over the last axis; in float32, cast back, then weighted."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., D)` to `(..., D)`."""
        return F.rms_norm(x.float(), x.shape[-1:], eps=NORM_EPSILON).type_as(x) * self.weight


class SwiGLU(nn.Module):
    """Gated feed-forward without biases (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, width, bias=False)
        self.up = nn.Linear(dim, width, bias=False)
        self.down = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, D)` to `(B, T, D)`."""
        gated: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return gated


class CausalAttention(nn.Module):
    """Causal self-attention with rotary positions and without biases."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, rotary: Tensor, cache: LayerCache | None) -> Tensor:
        """`(B, T, D)` to `(B, T, D)`; with a cache the T positions follow those in it, and are added to it.

        Args:
            x: `(B, T, D)`.
            rotary: `(T, d/2)`, of these positions.
            cache: of this layer.
        """
        heads = self.heads
        projected = self.qkv(x).unflatten(-1, (3 * heads, -1))
        query, key = rotate(projected[:, :, : 2 * heads], rotary).chunk(2, dim=2)
        value = projected[:, :, 2 * heads :]
        if cache is not None:
            key, value = cache.append(key, value)
        attended: Tensor = self.out(attend(query, key, value, causal=True).flatten(2))
        return attended


class Block(nn.Module):
    """h = x + attention(norm(x)), then h + feed-forward(norm(h)).

    Args:
        options: of the transformer.
        drop_path: chance to leave out a branch, per sample.
    """

    def __init__(self, options: TransformerOptions, drop_path: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(options.dim)
        self.attention = CausalAttention(options.dim, options.heads)
        self.ffn_norm = RMSNorm(options.dim)
        self.ffn = SwiGLU(options.dim, options.ffn_dim)
        self.dropout = options.dropout
        self.drop_path = drop_path

    def forward(self, x: Tensor, rotary: Tensor, cache: LayerCache | None) -> Tensor:
        """As `CausalAttention.forward`."""
        x = x + self._dropped(self.attention(self.attention_norm(x), rotary, cache))
        return x + self._dropped(self.ffn(self.ffn_norm(x)))

    def _dropped(self, branch: Tensor) -> Tensor:
        if not self.training:
            return branch
        branch = F.dropout(branch, self.dropout)
        if self.drop_path == 0:
            return branch
        kept = branch.new_empty(branch.shape[0], 1, 1).bernoulli_(1 - self.drop_path)
        return branch * kept / (1 - self.drop_path)


class Transformer(nn.Module):
    """A stack of blocks; what comes before and after is the generator's.

    Args:
        options: widths and dropout.
        layers: blocks of this stack.
    """

    def __init__(self, options: TransformerOptions, layers: int) -> None:
        super().__init__()
        self.options = options
        rates = [options.drop_path * layer / max(layers - 1, 1) for layer in range(layers)]
        self.blocks = nn.ModuleList(Block(options, rate) for rate in rates)

    def forward(self, x: Tensor, rotary: Tensor, cache: Sequence[LayerCache] | None = None) -> Tensor:
        """`(B, T, D)` to `(B, T, D)`.

        Args:
            x: `(B, T, D)`, the input of T positions in a row.
            rotary: `(T, d/2)`, the rotations of these positions.
            cache: of `new_cache`; the T positions follow those in it.
        """
        for layer, block in enumerate(self.blocks):
            x = block(x, rotary, None if cache is None else cache[layer])
        return x

    def new_cache(self, batch: int, capacity: int) -> list[LayerCache]:
        """An empty cache for sequences of up to `capacity` positions."""
        weight = next(self.parameters())
        return allocate(len(self.blocks), batch, capacity, self.options.heads, self.options.head_dim, weight)


def initialise(module: nn.Module) -> None:
    """Draw every linear and embedding weight below `module` from normal(0, 0.02); biases become 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=INITIAL_STD)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
