"""LPIPS of images and their references as a metric, with VGG16 or AlexNet (Zhang et al. 2018).

Legend: B batch, C channels, H W pixels, D channels of a layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from smalti.core.errors import UserError
from smalti.core.losses.lpips import LPIPSDistance, heads_file
from smalti.core.losses.vgg import TappedLayers, load_vgg16, with_weights
from smalti.eval.pairwise import unit_range

Network = Literal["alex", "vgg"]
ALEXNET_URL = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
ALEXNET_WIDTHS = (64, 192, 384, 256, 256)
# Kernel, stride, padding, and whether pixels are pooled before.
_CONVOLUTIONS = ((11, 4, 2, False), (5, 1, 2, True), (3, 1, 1, True), (3, 1, 1, False), (3, 1, 1, False))


class AlexNet(TappedLayers):
    """The features after its five convolutions (Krizhevsky 2014)."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        taps: list[int] = []
        before = 3
        for width, (kernel, stride, padding, pooled) in zip(ALEXNET_WIDTHS, _CONVOLUTIONS, strict=True):
            if pooled:
                layers.append(nn.MaxPool2d(3, 2))
            layers += [nn.Conv2d(before, width, kernel, stride, padding), nn.ReLU()]
            taps.append(len(layers) - 1)
            before = width
        super().__init__(layers, taps)


class LPIPS:
    """The distance of each image from its reference, 0 for equal images.

    Args:
        network: `alex`, which evaluations report most often, or `vgg`.
        backbone: file with the network's weights, torchvision's or one of a whole LPIPS; None looks in torch hub's
            cache.
        heads: file with the five linear layers; None looks there, then in an installed package `lpips`.

    Raises:
        UserError: weights are missing; it says what to download and where to put it.

    Attributes:
        definition: the figure in words, for protocols.
    """

    def __init__(self, network: Network, backbone: Path | None = None, heads: Path | None = None) -> None:
        if network == "alex":
            layers = with_weights(AlexNet(), backbone, option="backbone", url=ALEXNET_URL)
            distance = LPIPSDistance(layers, ALEXNET_WIDTHS)
        else:
            distance = LPIPSDistance(load_vgg16(backbone, option="backbone"))
        self.distance = distance.load_heads(heads_file(heads, network)).requires_grad_(False).eval()
        name = {"alex": "AlexNet", "vgg": "VGG16"}[network]
        self.definition = (
            f"LPIPS 0.1 with {name} (Zhang et al. 2018), images in [-1, 1] at their own size, float32; mean over images"
        )

    @torch.no_grad()
    def __call__(self, images: Tensor, references: Tensor) -> Tensor:
        """Images and references `(B, C, H, W)`, float in [-1, 1] or uint8, grey or RGB, to float64 `(B,)`.

        Raises:
            UserError: other shapes or types, or two different ones.
        """
        if images.is_floating_point():
            unit_range(images, references)  # for its checks: values outside [-1, 1] are left as they are
            pair = images, references
        else:
            first, second = unit_range(images, references)
            pair = first * 2 - 1, second * 2 - 1
        if images.shape[1] not in (1, 3):
            raise UserError(f"LPIPS takes images of 1 or 3 channels, got {images.shape[1]}")
        self.distance.to(images.device)
        rgb = (values.float().expand(-1, 3, -1, -1) for values in pair)
        distances: Tensor = self.distance(*rgb)
        return distances.double()
