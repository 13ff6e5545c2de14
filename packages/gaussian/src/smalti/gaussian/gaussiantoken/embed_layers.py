"""The layers that Gaussians are made by: perceptrons, and transformer layers with deformable attention.

Legend: B images, N Gaussians of an image, S places of the feature map, H W its sides (S = H W), E width.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from smalti.core.options import Options
from smalti.gaussian.attention.module import DeformableAttention

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


class DeformableStackOptions(Options):
    """Options of a stack of transformer layers with deformable attention.

    Args:
        layers: how many.
        heads: of all attention.
        points: free sampling points of a head, beside a fixed one.
        activation: of the layers' perceptrons.
        dropout: after attention and in the perceptrons.
    """

    layers: Count = 2
    heads: Count = 4
    points: Count = 4
    activation: Literal["relu", "gelu"] = "relu"
    dropout: Share = 0.1


def perceptron(inputs: int, width: int, *, linear: int, repeated: int) -> list[nn.Module]:
    """`repeated` times: `linear` times a linear layer with ReLU, then layer normalisation."""
    modules: list[nn.Module] = []
    for _ in range(repeated):
        for _ in range(linear):
            modules += [nn.Linear(inputs, width), nn.ReLU()]
            inputs = width
        modules.append(nn.LayerNorm(width))
    return modules


class Scale(nn.Module):
    """A learned factor of every channel, at first 1."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., width)` to the same."""
        return x * self.scale


def scaled_head(width: int, outputs: int) -> nn.Sequential:
    """Two double layers with normalisation, a linear one to `outputs`, and a factor for each of these."""
    return nn.Sequential(*perceptron(width, width, linear=2, repeated=2), nn.Linear(width, outputs), Scale(outputs))


class MapLayer(nn.Module):
    """Places of a feature map look at others: deformable attention, then a perceptron, normalised afterwards."""

    def __init__(self, width: int, options: DeformableStackOptions) -> None:
        super().__init__()
        self.attention = _deformable(width, options)
        self.norm1 = nn.LayerNorm(width)
        self.mlp = _mlp(width, options)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, memory: Tensor, positions: Tensor, reference: Tensor, shape: tuple[int, int]) -> Tensor:
        """Places `(B, S, E)` to the same.

        Args:
            memory: of a map of `shape` (H, W).
            positions: `(S, E)`, added to what asks.
            reference: `(B, S, 2)`, where every place lies, x and y in [0, 1].
            shape: H and W.
        """
        memory = self.norm1(memory + self.dropout(self.attention(memory + positions, reference, memory, [shape])))
        result: Tensor = self.norm2(memory + self.dropout(self.mlp(memory)))
        return result


class GaussianLayer(nn.Module):
    """Gaussians look at each other, then at the feature map around their centres, then pass a perceptron."""

    def __init__(self, width: int, options: DeformableStackOptions) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(width, options.heads, options.dropout, batch_first=True)
        self.norm1 = nn.LayerNorm(width)
        self.attention = _deformable(width, options)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = _mlp(width, options)
        self.norm3 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(options.dropout)

    def forward(
        self, features: Tensor, embedding: Tensor, reference: Tensor, memory: Tensor, shape: tuple[int, int]
    ) -> Tensor:
        """Features `(B, N, E)` to the same.

        Args:
            features: of the Gaussians.
            embedding: `(B, N, E)` of their anchors, added to what asks.
            reference: `(B, N, 2)`, their centres, x and y in [0, 1].
            memory: `(B, S, E)`, the feature map.
            shape: its H and W.
        """
        asking = features + embedding
        mixed, _ = self.self_attention(asking, asking, features, need_weights=False)
        features = self.norm1(features + self.dropout(mixed))
        seen = self.attention(features + embedding, reference, memory, [shape])
        features = self.norm2(features + self.dropout(seen))
        result: Tensor = self.norm3(features + self.dropout(self.mlp(features)))
        return result


def _deformable(width: int, options: DeformableStackOptions) -> DeformableAttention:
    return DeformableAttention(width, heads=options.heads, points=options.points)


def _mlp(width: int, options: DeformableStackOptions) -> nn.Sequential:
    activation = nn.ReLU() if options.activation == "relu" else nn.GELU()
    return nn.Sequential(
        nn.Linear(width, 4 * width), activation, nn.Dropout(options.dropout), nn.Linear(4 * width, width)
    )
