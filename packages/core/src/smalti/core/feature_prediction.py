"""A composed tokenizer whose heads predict a teacher's features from the tokens, for training (FQGAN, Bai et al. 2024).

Legend: B batch, N places of the latent, D channels that a head reads, W width of its features.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from smalti.core.backbones.positioned_transformer import PositionedTransformer
from smalti.core.contracts import TokenizerOutput
from smalti.core.errors import UserError
from smalti.core.options import Options
from smalti.core.tokenizer import ComposedOptions, ComposedTokenizer

Count = Annotated[int, Field(ge=1)]


class FeatureHeadOptions(Options):
    """Options of `FeatureHead`.

    Args:
        first: the first channel of the quantized latent that it reads.
        channels: D, how many it reads.
        width: W, of its features.
        depth: number of transformer blocks.
        heads: of their attention.
    """

    first: Annotated[int, Field(ge=0)]
    channels: Count
    width: Count
    depth: Count = 3
    heads: Count = 8


class FeatureHead(nn.Module):
    """Quantized vectors to features: two linear layers, a learned class vector in front, a transformer.

    Args:
        options: of the head.
        places: N.
    """

    def __init__(self, options: FeatureHeadOptions, places: int) -> None:
        super().__init__()
        width = options.width
        if width % options.heads:
            raise UserError(f"width {width} of a feature head cannot be divided among {options.heads} heads")
        self.options = options
        self.widen = nn.Sequential(nn.Linear(options.channels, width), nn.ReLU(), nn.Linear(width, width))
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(1, width))
        self.transformer = PositionedTransformer(1 + places, width, depth=options.depth, heads=options.heads)

    def forward(self, latent: Tensor) -> Tensor:
        """The quantized latent `(B, *space, all channels)` to features `(B, 1 + N, W)`, the image's own first."""
        first = self.options.first
        vectors = self.widen(latent[..., first : first + self.options.channels].flatten(1, -2))
        features: Tensor = self.transformer(
            torch.cat([self.class_embedding.expand(len(vectors), 1, -1), vectors], dim=1)
        )
        return features


class FeaturePredictingOptions(ComposedOptions):
    """Options of `FeaturePredictingTokenizer`: those of a composed tokenizer, and its heads.

    Args:
        feature_heads: by the names that their features get.
    """

    name: Literal["feature-predicting"] = "feature-predicting"  # type: ignore[assignment]
    feature_heads: Annotated[dict[str, FeatureHeadOptions], Field(min_length=1)]

    def build(self) -> FeaturePredictingTokenizer:
        """Build it."""
        return FeaturePredictingTokenizer(self)


class FeaturePredictingTokenizer(ComposedTokenizer):
    """A composed tokenizer whose `forward` also gives features, which training compares with those of a frozen teacher.

    Tokens and images are those of the composed tokenizer; the heads are for its preprocessing's image size.

    Attributes:
        feature_heads: by name.
    """

    def __init__(self, options: FeaturePredictingOptions) -> None:
        super().__init__(options)
        size = self.preprocessing.image_size
        places = math.prod(self.encoder.latent_space((size, size)))
        for name, head in options.feature_heads.items():
            if head.first + head.channels > self.quantizer.dim:
                raise UserError(
                    f"feature head {name!r} reads channels {head.first} to {head.first + head.channels - 1}, "
                    f"but the quantized latent has {self.quantizer.dim}"
                )
        self.feature_heads = nn.ModuleDict(
            {name: FeatureHead(head, places) for name, head in options.feature_heads.items()}
        )

    def forward(self, images: Tensor, *, proxy: bool = False, **context: Tensor) -> TokenizerOutput:
        """Encode, quantize, decode, and predict features `(B, 1 + N, W)`."""
        output = super().forward(images, proxy=proxy, **context)
        latent = output.features["latent"]
        features = {name: head(latent) for name, head in self.feature_heads.items()}
        return dataclasses.replace(output, features=output.features | features)
