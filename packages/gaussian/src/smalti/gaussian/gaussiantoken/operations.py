"""What is done to Gaussians, in turn: they look around, pass linear layers, and move.

Legend: B images, N Gaussians of an image, A entries of an anchor, E width, Z channels of a Gaussian's feature.

An anchor is a Gaussian before its numbers are brought into their ranges: x, y, rotation, two scales, perhaps opacity,
and E hidden features.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from smalti.core.options import Options
from smalti.gaussian.gaussiantoken.embed_layers import DeformableStackOptions, GaussianLayer, Share, scaled_head
from smalti.gaussian.gaussiantoken.geometry import unit


class AttentionOptions(DeformableStackOptions):
    """Options of `GaussianAttention`.

    Args:
        shortcut: how its input comes back in: `concatenate`, beside the result, which is then twice as wide; `add`.
        last_dropout: of the result, before that.
    """

    shortcut: Literal["concatenate", "add"] = "concatenate"
    last_dropout: Share = 0.1


class FeedForwardOptions(Options):
    """Options of `FeedForward`.

    Args:
        linear: linear layers, the last one included.
        norm_in: normalise what comes in, for the shortcut as well.
        norm_out: normalise what goes out.
        shortcut: a linear layer beside them.
        dropout: after every linear layer.
    """

    linear: Annotated[int, Field(ge=2)] = 2
    norm_in: bool = True
    norm_out: bool = False
    shortcut: bool = True
    dropout: Share = 0.0


class GaussianAttention(nn.Module):
    """Layers in which Gaussians look at each other and at the feature map."""

    def __init__(self, width: int, options: AttentionOptions) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GaussianLayer(width, options) for _ in range(options.layers))
        self.dropout = nn.Dropout(options.last_dropout)
        self.concatenates = options.shortcut == "concatenate"

    def forward(
        self, features: Tensor, embedding: Tensor, centres: Tensor, memory: Tensor, shape: tuple[int, int]
    ) -> Tensor:
        """Features `(B, N, E)` to `(B, N, 2 E)` or `(B, N, E)`; the arguments are those of `GaussianLayer`."""
        result = features
        for layer in self.layers:
            result = layer(result, embedding, centres, memory, shape)
        result = self.dropout(result)
        return torch.cat([result, features], dim=-1) if self.concatenates else result + features


class FeedForward(nn.Module):
    """Linear layers with ReLU between them, of width 4 E, beside a linear shortcut.

    Args:
        inputs: width that comes in.
        width: E.
        options: what there is of it.
    """

    def __init__(self, inputs: int, width: int, options: FeedForwardOptions) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(inputs) if options.norm_in else nn.Identity()
        widths = [inputs, *[4 * width] * (options.linear - 1)]
        self.hidden = nn.ModuleList(nn.Linear(before, 4 * width) for before in widths[:-1])
        self.out = nn.Linear(widths[-1], width)
        self.shortcut = nn.Linear(inputs, width) if options.shortcut else None
        self.norm_out = nn.LayerNorm(width) if options.norm_out else nn.Identity()
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, features: Tensor) -> Tensor:
        """`(B, N, inputs)` to `(B, N, E)`."""
        inputs = self.norm_in(features)
        x = inputs
        for layer in self.hidden:
            x = self.dropout(F.relu(layer(x)))
        x = self.dropout(self.out(x))
        result: Tensor = self.norm_out(x if self.shortcut is None else self.shortcut(inputs) + x)
        return result


class Refinement(nn.Module):
    """New anchors of Gaussians.

    Args:
        width: E.
        entries: A.
        moved: how many of an anchor's first entries are added to; the others are made anew.
    """

    def __init__(self, width: int, entries: int, moved: int) -> None:
        super().__init__()
        self.head = scaled_head(width, entries)
        self.moved = moved

    def forward(self, features: Tensor, embedding: Tensor, anchors: Tensor) -> Tensor:
        """The anchors `(B, N, A)` after this, from features and embedded anchors `(B, N, E)`, and the anchors."""
        made = self.head(features + embedding)
        return torch.cat([made[..., : self.moved] + anchors[..., : self.moved], made[..., self.moved :]], dim=-1)


def centres(anchors: Tensor) -> Tensor:
    """Where Gaussians with anchors `(B, N, A)` lie on the feature map: x and y in [0, 1], `(B, N, 2)`."""
    return unit(anchors[..., :2])
