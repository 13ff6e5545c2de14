"""The PatchGAN discriminator of pix2pix (Isola et al. 2017, appendix 6.1.2), as taming-transformers trains it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from smalti.core.options import DiscriminatorOptions


class PatchGANOptions(DiscriminatorOptions):
    """Options of `PatchGAN`.

    Args:
        width: channels after the first convolution.
        layers: convolutions of stride 2; each doubles the channels, up to 8 times `width`.
    """

    name: Literal["patchgan"] = "patchgan"
    width: Annotated[int, Field(ge=1)] = 64
    layers: Annotated[int, Field(ge=1)] = 3

    def build(self, channels: int) -> PatchGAN:
        """Build it for images of `channels` channels."""
        return PatchGAN(self, channels)


class PatchGAN(nn.Module):
    """Images `(B, C, H, W)` in [-1, 1] to a map of logits `(B, 1, h, w)`, one per overlapping patch.

    Convolutions 4 x 4, batch normalisation after all but the first and the last, LeakyReLU 0.2; weights
    normal(0, 0.02), normalisation scales normal(1, 0.02).
    """

    def __init__(self, options: PatchGANOptions, channels: int) -> None:
        super().__init__()
        self.options = options
        width = options.width
        blocks: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for layer in range(1, options.layers + 1):
            wider = options.width * min(2**layer, 8)
            stride = 2 if layer < options.layers else 1
            blocks += [
                nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        self.blocks = nn.Sequential(*blocks, nn.Conv2d(width, 1, 4, stride=1, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Judge the images."""
        logits: Tensor = self.blocks(images)
        return logits
