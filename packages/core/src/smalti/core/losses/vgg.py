"""The convolutions of VGG16 (Simonyan and Zisserman 2015) and the features that losses compare.

Legend: B batch, H W pixels, D channels of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from smalti.core.checkpoints.file import read_checkpoint
from smalti.core.losses.weight_files import fill, weight_file

URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
WIDTHS = (64, 128, 256, 512, 512)
DEPTHS = (2, 2, 3, 3, 3)
# LPIPS normalises images in [-1, 1] by the statistics of ImageNet, rounded.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)

Network = TypeVar("Network", bound="TappedLayers")


class TappedLayers(nn.Module):
    """Images `(B, 3, H, W)` in [-1, 1], normalised as LPIPS does, to the outputs of some of the layers.

    Args:
        layers: one after the other, numbered as in torchvision, whose files fill them.
        taps: numbers of the layers whose outputs are wanted.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, layers: Sequence[nn.Module], taps: Sequence[int]) -> None:
        super().__init__()
        self.features = nn.Sequential(*layers)
        self.taps = tuple(taps)
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Maps `(B, D, h, w)`, one for each tap."""
        x = (images - self.shift) / self.scale
        found = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.taps:
                found.append(x)
        return found


class VGG16(TappedLayers):
    """The features after relu1_2, 2_2, 3_3, 4_3 and 5_3."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        taps: list[int] = []
        before = 3
        for width, depth in zip(WIDTHS, DEPTHS, strict=True):
            if layers:
                layers.append(nn.MaxPool2d(2))
            for _ in range(depth):
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
                before = width
            taps.append(len(layers) - 1)
        super().__init__(layers, taps)


def load_vgg16(given: Path | None, *, option: str = "vgg") -> VGG16:
    """The network with the weights of ImageNet, see `with_weights`."""
    return with_weights(VGG16(), given, option=option, url=URL)


def with_weights(network: Network, given: Path | None, *, option: str, url: str) -> Network:
    """A network with weights from torchvision's file or one in the layout of LPIPS.

    Args:
        network: to be filled, in place.
        given: a file, None looks for that of `url` in torch hub's cache.
        option: the option that gives the file, for errors.
        url: where torchvision publishes it.

    Raises:
        UserError: there is no such file, or another one.
    """
    path = weight_file(given, option=option, what=type(network).__name__, url=url)
    fill(network, _torchvision_names(read_checkpoint(path)), path)
    return network


def _torchvision_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of LPIPS, `net.slice1.0.weight`, as torchvision's, `features.0.weight`; those stay."""
    found = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        of_lpips = parts[0] == "net" and len(parts) == 4
        found[".".join(("features", *parts[2:])) if of_lpips else name] = tensor
    return found
