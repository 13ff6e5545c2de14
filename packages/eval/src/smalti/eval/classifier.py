"""A small CNN classifier: the feature space in which a run without published extractors is judged.

Legend: B batch, H W pixels, D width of the pooled features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from smalti.core import weights
from smalti.core.contracts import Features, check_pixels
from smalti.core.options import FeaturesOptions, Options
from smalti.core.weights import Pretrained, validated


class ClassifierOptions(FeaturesOptions):
    """A classifier that `smalti evaluate` trained.

    Args:
        folder: where it lies, `RUN/evaluation/classifier`.
    """

    name: Literal["classifier"] = "classifier"
    folder: Path

    def build(self) -> Classifier:
        """Load it."""
        return Classifier.from_pretrained(self.folder)


class Architecture(Options):
    """What a classifier is built from.

    Args:
        classes: how many it tells apart.
        image_size: side in pixels of the images it is made for; each doubling adds a level.
        width: channels of the first level; the next has twice, all further ones four times as many.
        dropout: share of the pooled features that training drops.
    """

    classes: Annotated[int, Field(ge=2)]
    image_size: Annotated[int, Field(ge=8)] = 32
    width: Annotated[int, Field(ge=4)] = 24
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.3


class Classifier(Features, Pretrained):
    """Convolutions with batch normalisation, a level per halving down to 4 x 4 pixels or so, average pooling.

    Attributes:
        architecture: what it was built from.
    """

    kind = "classifier"

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        levels = max(1, round(math.log2(architecture.image_size)) - 2)
        channels = architecture.width
        blocks = [_block(3, channels, kernel=4, stride=2), _block(channels, channels)]
        for level in range(1, levels):
            wider = architecture.width * min(2**level, 4)
            blocks += [nn.MaxPool2d(2), _block(channels, wider)]
            if level < levels - 1:
                blocks.append(_block(wider, wider))
            channels = wider
        self.body = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, architecture.classes)

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """Sixteen hex digits of architecture and weights."""
        return weights.fingerprint(self, self.config())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images uint8 `(B, H, W, 3)` to `{"pool": (B, D), "logits": (B, classes)}`.

        Raises:
            UserError: images of another type or shape.
        """
        check_pixels(images)
        values = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        pool = self.body(values).mean((2, 3))
        return {"pool": pool, "logits": self.head(F.dropout(pool, self.architecture.dropout, self.training))}

    def config(self) -> dict[str, Any]:
        """What `config.json` holds beside the weights."""
        return {"kind": self.kind, "architecture": self.architecture.model_dump(mode="json")}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build it from what `config()` gave."""
        return cls(validated(_Config, config).architecture)


class _Config(Options):
    kind: Literal["classifier"]
    architecture: Architecture


def _block(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Module:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())
