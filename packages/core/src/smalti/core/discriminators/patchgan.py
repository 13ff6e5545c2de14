"""The PatchGAN discriminator of pix2pix (Isola et al. 2017, appendix 6.1.2), as taming-transformers trains it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from smalti.core.errors import UserError
from smalti.core.options import DiscriminatorOptions

GROUPS = 32


class PatchGANOptions(DiscriminatorOptions):
    """Options of `PatchGAN`.

    Args:
        width: channels after the first convolution.
        layers: convolutions of stride 2; each doubles the channels, up to 8 times `width`.
        norm: after all convolutions but the first and the last: `batch`; `group`, in 32 groups, so that one image's
            logits do not depend on the others; `none`.
        init: `normal`, weights of standard deviation 0.02 (pix2pix, taming, LlamaGen); `default`, torch's.
    """

    name: Literal["patchgan"] = "patchgan"
    width: Annotated[int, Field(ge=1)] = 64
    layers: Annotated[int, Field(ge=1)] = 3
    norm: Literal["batch", "group", "none"] = "batch"
    init: Literal["normal", "default"] = "normal"

    @model_validator(mode="after")
    def _groups(self) -> Self:
        if self.norm == "group" and self.width * 2 % GROUPS:
            raise ValueError(f"norm: group needs a width that is a multiple of {GROUPS // 2}, got {self.width}")
        return self

    def build(self, channels: int) -> PatchGAN:
        """Build it for images of `channels` channels."""
        return PatchGAN(self, channels)


class PatchGAN(nn.Module):
    """Images `(B, C, H, W)` in [-1, 1] to a map of logits `(B, 1, h, w)`, one per overlapping patch.

    Convolutions 4 x 4, normalised as `norm` says, LeakyReLU 0.2; with `init: normal` weights normal(0, 0.02) and
    scales of batch normalisation normal(1, 0.02).
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
                nn.Conv2d(width, wider, 4, stride=stride, padding=1, bias=options.norm == "none"),
                _norm(options.norm, wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        self.blocks = nn.Sequential(*blocks, nn.Conv2d(width, 1, 4, stride=1, padding=1))
        if options.init == "default":
            return
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Judge the images.

        Raises:
            UserError: they are too small.
        """
        height, width = images.shape[2:]
        smallest = 3 * 2**self.options.layers
        if min(height, width) < smallest:
            raise UserError(
                f"patchgan with layers: {self.options.layers} takes images of {smallest}x{smallest} and more, "
                f"got {height}x{width}"
            )
        logits: Tensor = self.blocks(images)
        return logits


def _norm(kind: Literal["batch", "group", "none"], width: int) -> nn.Module:
    match kind:
        case "batch":
            return nn.BatchNorm2d(width)
        case "group":
            return nn.GroupNorm(GROUPS, width)
        case "none":
            return nn.Identity()
