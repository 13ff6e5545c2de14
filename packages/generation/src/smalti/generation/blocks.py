"""The blocks of transformers: attention and feed-forward with residual connections.

What changes numbers from one published model to the other is a field of `Architecture`; nothing else is.

Legend: B batch, T positions, H heads, d width of a head, D width of the model (D = H d), F width of the feed-forward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.generation.attention import Mask, attend
from smalti.generation.cache import LayerCache
from smalti.generation.norms import Modulation, NormKind, build_norm, modulated
from smalti.generation.rotary import rotate


@dataclass(frozen=True)
class Architecture:
    """What a transformer computes.

    Args:
        layers: blocks.
        dim: D.
        heads: H.
        ffn_dim: F.
        norm: of the branches' inputs.
        norm_eps: of all norms.
        ffn: `swiglu`, down(silu(gate) * up); `gelu`, exact, or `gelu-tanh`, its approximation: down(gelu(up)).
        bias: whether attention output and feed-forward have biases.
        qkv_bias: which of queries, keys and values have biases.
        query_key_norm: of every head's queries and keys: `layer`, LayerNorm with weight and bias (RAR); `cosine`, unit
            length, and products multiplied by a learned factor per head, at most 100 (VAR).
        attention_scale: of the products of queries and keys; None is d^-0.5. Not with `cosine`.
        modulation: AdaLN: `block`, every block has its own linear layer; `shared`, one for all, to which every block
            adds a table of its own.
        condition_dim: C, width of the condition of the modulation.
        post_norm: norms stand behind the residual sums (BERT) instead of before the branches.
        dropout: after both branches.
        attention_dropout: of the attention matrix.
        drop_path: chance to leave out a branch of the last block, per sample, rising linearly from 0 at the first
            (stochastic depth, Huang et al. 2016).
    """

    layers: int
    dim: int
    heads: int
    ffn_dim: int
    norm: NormKind = "rms"
    norm_eps: float = 1e-5
    ffn: Literal["swiglu", "gelu", "gelu-tanh"] = "swiglu"
    bias: bool = False
    qkv_bias: Literal["none", "query-value", "all"] = "none"
    query_key_norm: Literal["none", "layer", "cosine"] = "none"
    attention_scale: float | None = None
    modulation: Literal["none", "block", "shared"] = "none"
    condition_dim: int = 0
    post_norm: bool = False
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.0

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.dim // self.heads


class FeedForward(nn.Module):
    """Gated (Shazeer 2020) or plain; the projections of the gated form are one, gate first."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.kind = architecture.ffn
        gates = 2 if self.kind == "swiglu" else 1
        self.up = nn.Linear(architecture.dim, gates * architecture.ffn_dim, bias=architecture.bias)
        self.down = nn.Linear(architecture.ffn_dim, architecture.dim, bias=architecture.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, D)` to `(B, T, D)`."""
        inner = self.up(x)
        if self.kind == "swiglu":
            gate, inner = inner.chunk(2, dim=-1)
            inner = F.silu(gate) * inner
        else:
            inner = F.gelu(inner, approximate="none" if self.kind == "gelu" else "tanh")
        outer: Tensor = self.down(inner)
        return outer


class Attention(nn.Module):
    """Self-attention with one projection to queries, keys and values, in this order."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        dim = architecture.dim
        self.heads, self.head_dim = architecture.heads, architecture.head_dim
        self.scale, self.dropout = architecture.attention_scale, architecture.attention_dropout
        self.query_key_norm = architecture.query_key_norm
        self.qkv = nn.Linear(dim, 3 * dim, bias=architecture.qkv_bias == "all")
        self.without_key_bias = architecture.qkv_bias == "query-value"
        if self.without_key_bias:
            self.query_bias, self.value_bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.out = nn.Linear(dim, dim, bias=architecture.bias)
        if self.query_key_norm == "layer":
            self.query_norm = nn.LayerNorm(self.head_dim, architecture.norm_eps)
            self.key_norm = nn.LayerNorm(self.head_dim, architecture.norm_eps)
        elif self.query_key_norm == "cosine":
            self.log_scale = nn.Parameter(torch.full((self.heads,), math.log(4.0)))
            self.scale = 1.0

    def forward(self, x: Tensor, rotary: Tensor | None, mask: Mask, cache: LayerCache | None) -> Tensor:
        """`(B, T, D)` to `(B, T, D)`; with a cache the T positions follow those in it, and are added to it.

        Args:
            x: `(B, T, D)`.
            rotary: `(T, d/2)`, of these positions.
            mask: what each position sees.
            cache: of this layer.
        """
        projected = self.qkv(x)
        if self.without_key_bias:
            projected = projected + torch.cat([self.query_bias, torch.zeros_like(self.query_bias), self.value_bias])
        query, key, value = projected.unflatten(-1, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        if self.query_key_norm == "layer":
            query, key = self.query_norm(query), self.key_norm(key)
        elif self.query_key_norm == "cosine":
            # exp(log_scale) is at most 100, as in the original, so that products cannot run away
            factors = self.log_scale.clamp(max=math.log(100.0)).exp().view(-1, 1, 1)
            query, key = F.normalize(query, dim=-1) * factors, F.normalize(key, dim=-1)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        if cache is not None:
            key, value = cache.append(key, value)
        dropout = self.dropout if self.training else 0.0
        attended = attend(query, key, value, mask=mask, scale=self.scale, dropout=dropout)
        outputs: Tensor = self.out(attended.transpose(1, 2).flatten(2))
        return outputs


class Block(nn.Module):
    """x + gate_a * attention(norm(x)), then the same with the feed-forward.

    Without modulation the gates are 1; with it, norms are followed by scale and shift. Behind residual sums
    (`post_norm`) it is norm(x + attention(x)).

    Args:
        architecture: what it computes.
        drop_path: chance to leave out a branch, per sample.
    """

    def __init__(self, architecture: Architecture, drop_path: float = 0.0) -> None:
        super().__init__()
        dim, eps = architecture.dim, architecture.norm_eps
        self.attention_norm = build_norm(architecture.norm, dim, eps)
        self.attention = Attention(architecture)
        self.ffn_norm = build_norm(architecture.norm, dim, eps)
        self.ffn = FeedForward(architecture)
        self.dropout, self.drop_path = architecture.dropout, drop_path
        self.post_norm = architecture.post_norm
        if architecture.modulation == "block":
            self.modulation = Modulation(architecture.condition_dim, dim, 6)
        elif architecture.modulation == "shared":
            self.modulation_table = nn.Parameter(torch.zeros(6, dim))

    def forward(
        self,
        x: Tensor,
        rotary: Tensor | None = None,
        mask: Mask = "none",
        cache: LayerCache | None = None,
        modulation: Tensor | None = None,
    ) -> Tensor:
        """`(B, T, D)` to `(B, T, D)`.

        Args:
            x: `(B, T, D)`.
            rotary: as for `Attention`.
            mask: as for `Attention`.
            cache: as for `Attention`.
            modulation: `(B, T or 1, 6, D)`, of `Modulation`, for this block.
        """
        if self.post_norm:
            x = self.attention_norm(x + self._dropped(self.attention(x, rotary, mask, cache)))
            summed: Tensor = self.ffn_norm(x + self._dropped(self.ffn(x)))
            return summed
        if modulation is None:
            x = x + self._dropped(self.attention(self.attention_norm(x), rotary, mask, cache))
            return x + self._dropped(self.ffn(self.ffn_norm(x)))
        gate_a, gate_f, scale_a, scale_f, shift_a, shift_f = modulation.unbind(-2)
        inner = modulated(self.attention_norm(x), scale_a, shift_a)
        x = x + self._dropped(gate_a * self.attention(inner, rotary, mask, cache))
        return x + self._dropped(gate_f * self.ffn(modulated(self.ffn_norm(x), scale_f, shift_f)))

    def _dropped(self, branch: Tensor) -> Tensor:
        if not self.training:
            return branch
        branch = F.dropout(branch, self.dropout)
        if self.drop_path == 0:
            return branch
        kept = branch.new_empty(branch.shape[0], 1, 1).bernoulli_(1 - self.drop_path)
        return branch * kept / (1 - self.drop_path)
