"""The perceptual distance LPIPS (Zhang et al. 2018), as a loss with VGG16.

Legend: B batch, H W pixels, D channels of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor, nn

from smalti.core.checkpoints.file import read_checkpoint
from smalti.core.losses.loss import Loss, Reconstruction
from smalti.core.losses.vgg import WIDTHS, load_vgg16
from smalti.core.losses.weight_files import fill, weight_file
from smalti.core.options import LossOptions
from smalti.core.training.frozen import Frozen
from smalti.core.training.network_images import as_rgb

HEADS = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/{}.pth"


class LPIPSOptions(LossOptions):
    """Options of `LPIPS`.

    Args:
        vgg: file with the weights of VGG16, torchvision's or one of a whole LPIPS; null looks in torch hub's cache.
        heads: file with the five linear layers, `lin0.model.1.weight` and so on; null looks in torch hub's cache,
            then in an installed package `lpips`.
    """

    name: Literal["lpips"] = "lpips"
    vgg: Path | None = None
    heads: Path | None = None

    def build(self) -> LPIPS:
        """Build it.

        Raises:
            UserError: weights are missing, see `weight_file`.
        """
        heads = heads_file(self.heads, "vgg")
        return LPIPS(self, LPIPSDistance(load_vgg16(self.vgg)).load_heads(heads))


def heads_file(given: Path | None, network: str) -> Path:
    """The file with the linear layers that were trained for `network`, `vgg` or `alex`.

    Raises:
        UserError: there is none, see `weight_file`.
    """
    return weight_file(given, option="heads", what="LPIPS", url=HEADS.format(network), elsewhere=_of_package(network))


class LPIPSDistance(nn.Module):
    """The distance of two batches of images.

    Features of unit length over channels, their squared difference weighted per channel, averaged over the places,
    summed over the five layers. There is no dropout: the published weights were trained with it, the distance is
    without.

    Args:
        network: images `(B, 3, H, W)` in [-1, 1] to five feature maps.
        widths: their channels.
    """

    def __init__(self, network: nn.Module, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.network = network
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in widths)

    def load_heads(self, path: Path) -> Self:
        """Take the linear layers from a file, `lin0.model.1.weight` and so on.

        Raises:
            UserError: they are not in it, or have other sizes.
        """
        found = {name: tensor for name, tensor in read_checkpoint(path).items() if name.startswith("lin")}
        fill(self.heads, {f"{_number(name)}.weight": tensor for name, tensor in found.items()}, path)
        return self

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Two times `(B, 3, H, W)` in [-1, 1] to `(B,)`."""
        distance = first.new_zeros(len(first), dtype=torch.promote_types(first.dtype, torch.float32))
        for head, one, other in zip(self.heads, self.network(first), self.network(second), strict=True):
            difference = (_unit(one) - _unit(other)).square()
            distance = distance + head(difference).mean((1, 2, 3))
        return distance


class LPIPS(Loss):
    """Mean LPIPS of reconstructions and images."""

    def __init__(self, options: LPIPSOptions, distance: LPIPSDistance) -> None:
        super().__init__()
        self.options = options
        self.distance = Frozen(distance)

    def forward(self, output: Reconstruction, images: Tensor, step: int) -> Tensor:
        """The mean over the batch."""
        distances: Tensor = self.distance(as_rgb(images), as_rgb(output.images))
        return distances.mean()


def _unit(features: Tensor) -> Tensor:
    # Added to the norm and not under its root: that is what the weights were trained with.
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)


def _number(name: str) -> str:
    return name.split(".")[0].removeprefix("lin")


def _of_package(network: str) -> tuple[Path, ...]:
    package = find_spec("lpips")
    if package is None or package.origin is None:
        return ()
    return (Path(package.origin).parent / "weights" / "v0.1" / f"{network}.pth",)
