"""The perceptual distance LPIPS with VGG16 (Zhang et al. 2018).

Legend: B batch, H W pixels, D channels of a layer.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from smalti.core.checkpoints.file import read_checkpoint
from smalti.core.losses.loss import Loss, Reconstruction
from smalti.core.losses.vgg import WIDTHS, load_vgg16
from smalti.core.losses.weight_files import fill, weight_file
from smalti.core.options import LossOptions
from smalti.core.training.frozen import Frozen
from smalti.core.training.network_images import as_rgb

URL = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth"


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
        path = weight_file(self.heads, option="heads", what="LPIPS", url=URL, elsewhere=_of_package())
        distance = LPIPSDistance(load_vgg16(self.vgg))
        fill(distance.heads, {f"{_number(name)}.weight": heads for name, heads in _heads(path).items()}, path)
        return LPIPS(self, distance)


class LPIPSDistance(nn.Module):
    """The distance of two batches of images.

    Features of unit length over channels, their squared difference weighted per channel, averaged over the places,
    summed over the five layers. There is no dropout: the published weights were trained with it, the distance is
    without.
    """

    def __init__(self, vgg: nn.Module) -> None:
        super().__init__()
        self.vgg = vgg
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in WIDTHS)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Two times `(B, 3, H, W)` in [-1, 1] to `(B,)`."""
        distance = first.new_zeros(len(first), dtype=torch.promote_types(first.dtype, torch.float32))
        for head, one, other in zip(self.heads, self.vgg(first), self.vgg(second), strict=True):
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


def _heads(path: Path) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in read_checkpoint(path).items() if name.startswith("lin")}


def _number(name: str) -> str:
    return name.split(".")[0].removeprefix("lin")


def _of_package() -> tuple[Path, ...]:
    package = find_spec("lpips")
    if package is None or package.origin is None:
        return ()
    return (Path(package.origin).parent / "weights" / "v0.1" / "vgg.pth",)
