"""The style loss of Gatys et al. (2016): correlations of features instead of features.

Legend: B batch, D channels of a layer, h w its grid.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from smalti.core.losses.loss import Loss, Reconstruction
from smalti.core.losses.vgg import VGG16, load_vgg16
from smalti.core.options import LossOptions
from smalti.core.training.frozen import Frozen
from smalti.core.training.network_images import as_rgb


class GramOptions(LossOptions):
    """Options of `Gram`.

    Args:
        vgg: file with the weights of VGG16, torchvision's or one of a whole LPIPS; null looks in torch hub's cache.
    """

    name: Literal["gram"] = "gram"
    vgg: Path | None = None

    def build(self) -> Gram:
        """Build it.

        Raises:
            UserError: the weights are missing.
        """
        return Gram(self, load_vgg16(self.vgg))


class Gram(Loss):
    """Mean squared difference of the Gram matrices of reconstructions and images, averaged over VGG16's five layers."""

    def __init__(self, options: GramOptions, vgg: VGG16) -> None:
        super().__init__()
        self.options = options
        self.vgg = Frozen(vgg)

    def forward(self, output: Reconstruction, images: Tensor, step: int) -> Tensor:
        """The mean over layers, batch and elements."""
        pairs = zip(self.vgg(as_rgb(output.images)), self.vgg(as_rgb(images)), strict=True)
        return torch.stack([(gram(one) - gram(other)).square().mean() for one, other in pairs]).mean()


def gram(features: Tensor) -> Tensor:
    """Features `(B, D, h, w)` to the mean products of two channels over the places, `(B, D, D)`, in float32."""
    # Sums over ten thousands of places leave the range of half precision.
    flat = features.flatten(2).to(torch.promote_types(features.dtype, torch.float32))
    with torch.autocast(features.device.type, enabled=False):
        return flat @ flat.transpose(1, 2) / flat.shape[2]
