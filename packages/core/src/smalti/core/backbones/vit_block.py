"""The pre-norm transformer block of vision transformers.

Legend: B batch, N sequence length, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Literal["gelu", "gelu-tanh", "quick-gelu", "tanh"]


class QuickGELU(nn.Module):
    """`x sigmoid(1.702 x)`, the GELU of OpenAI's CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        return x * torch.sigmoid(1.702 * x)


def activation_layer(name: Activation) -> nn.Module:
    """The activation of that name: `gelu` is the exact one, `gelu-tanh` its usual approximation."""
    match name:
        case "gelu":
            return nn.GELU()
        case "gelu-tanh":
            return nn.GELU(approximate="tanh")
        case "quick-gelu":
            return QuickGELU()
        case "tanh":
            return nn.Tanh()


class SelfAttention(nn.Module):
    """Multi-head self-attention, `softmax(q k / sqrt(D / heads)) v`; one fused projection in the order q, k, v."""

    def __init__(self, width: int, heads: int, *, qkv_bias: bool = True) -> None:
        super().__init__()
        assert width % heads == 0, f"width {width} cannot be divided among {heads} heads"
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, D)` to the same."""
        batch, length, width = x.shape
        query, key, value = (
            self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        y: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return y


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training drops a sample's branch, scales the branches that stay.

    Args:
        probability: of dropping, in [0, 1).
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        assert 0 <= probability < 1, probability
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """`(B, ...)` to the same."""
        if self.probability == 0 or not self.training:
            return x
        kept = torch.rand(x.shape[0], *(1 for _ in x.shape[1:]), device=x.device) >= self.probability
        return x * (kept / (1 - self.probability)).to(x.dtype)


class ViTBlock(nn.Module):
    """`x + scale1 attention(norm1(x))`, then `x + scale2 mlp(norm2(x))` (Dosovitskiy et al. 2021).

    Args:
        width: D.
        heads: of the attention; they divide the width.
        mlp_width: of the hidden layer, 4 D by default.
        eps: of the layer normalisations.
        qkv_bias: whether the projection to query, key and value has a bias.
        activation: of the hidden layer.
        layer_scale: start value of the scales of LayerScale (Touvron et al. 2021); without it there are none.
        drop_path: probability with which stochastic depth drops each branch in training.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        mlp_width: int | None = None,
        eps: float = 1e-5,
        qkv_bias: bool = True,
        activation: Activation = "gelu",
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = 4 * width if mlp_width is None else mlp_width
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attention = SelfAttention(width, heads, qkv_bias=qkv_bias)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), activation_layer(activation), nn.Linear(hidden, width))
        self.drop_path = DropPath(drop_path)
        self.scale1: nn.Parameter | None = None
        self.scale2: nn.Parameter | None = None
        if layer_scale is not None:
            self.scale1 = nn.Parameter(torch.full((width,), layer_scale))
            self.scale2 = nn.Parameter(torch.full((width,), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, N, D)` to the same."""
        branch = self.attention(self.norm1(x))
        x = x + self.drop_path(branch if self.scale1 is None else self.scale1 * branch)
        branch = self.mlp(self.norm2(x))
        y: Tensor = x + self.drop_path(branch if self.scale2 is None else self.scale2 * branch)
        return y
