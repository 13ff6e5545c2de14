"""The discriminator of MaskBit (Weber et al. 2024) and TiTok: blur-pooling between normalised convolutions.

Legend: B batch, C image channels, H W pixels.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from smalti.core.discriminators.blur import Blur
from smalti.core.options import DiscriminatorOptions

SLOPE = 0.1
GROUPS = 32
MAP = 16  # side of the map of logits


class TiTokDiscriminatorOptions(DiscriminatorOptions):
    """Options of `TiTokDiscriminator`.

    Args:
        width: channels of the first convolution and the first stage; every later stage doubles them.
        stages: each halves the resolution.
        pool: how: blur with so many taps, or `average`.
    """

    name: Literal["titok"] = "titok"
    width: Annotated[int, Field(ge=GROUPS, multiple_of=GROUPS)] = 128
    stages: Annotated[int, Field(ge=1)] = 3
    pool: Literal[3, 4, 5, "average"] = 4

    def build(self, channels: int) -> TiTokDiscriminator:
        """Build it for images of `channels` channels."""
        return TiTokDiscriminator(self, channels)


class TiTokDiscriminator(nn.Module):
    """Images `(B, C, H, W)` to logits `(B, 1, 16, 16)`, the largest features of 16 x 16 regions being judged."""

    def __init__(self, options: TiTokDiscriminatorOptions, channels: int) -> None:
        super().__init__()
        self.options = options
        layers: list[nn.Module] = [nn.Conv2d(channels, options.width, 5, padding=2), nn.LeakyReLU(SLOPE)]
        width = options.width
        for stage in range(options.stages):
            wider = options.width * 2**stage
            layers += [
                nn.Conv2d(width, wider, 3, padding=1),
                _pool(options.pool),
                nn.GroupNorm(GROUPS, wider),
                nn.LeakyReLU(SLOPE),
            ]
            width = wider
        self.features = nn.Sequential(*layers, nn.AdaptiveMaxPool2d(MAP))
        self.head = nn.Sequential(nn.Conv2d(width, width, 1), nn.LeakyReLU(SLOPE), nn.Conv2d(width, 1, 5, padding=2))

    def forward(self, images: Tensor) -> Tensor:
        """Judge the images."""
        logits: Tensor = self.head(self.features(images))
        return logits


def _pool(pool: Literal[3, 4, 5, "average"]) -> nn.Module:
    if pool == "average":
        return nn.AvgPool2d(2)
    # The padding is that of four taps for all of them, as the published weights were trained.
    return Blur(pool, padding=1, stride=2)
