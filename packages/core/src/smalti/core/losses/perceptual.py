"""Perceptual distance by the logits of an ImageNet classifier, as MaskBit and TA-TiTok use it.

Legend: B batch, H W pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.core.checkpoints.file import read_checkpoint
from smalti.core.errors import UserError
from smalti.core.losses.loss import Loss, Reconstruction
from smalti.core.losses.weight_files import fill, weight_file
from smalti.core.options import LossOptions
from smalti.core.training.frozen import Frozen
from smalti.core.training.network_images import Normalisation

SIZE = 224
# Names of torchvision and the files of the weights IMAGENET1K_V1.
NETWORKS = {
    "resnet50": ("resnet50", "https://download.pytorch.org/models/resnet50-0676ba61.pth"),
    "convnext_s": ("convnext_small", "https://download.pytorch.org/models/convnext_small-0c510722.pth"),
}


class PerceptualOptions(LossOptions):
    """Options of `Perceptual`.

    Args:
        network: whose logits are compared.
        weights: torchvision's file with them (IMAGENET1K_V1); null looks in torch hub's cache.
    """

    name: Literal["perceptual"] = "perceptual"
    network: Literal["resnet50", "convnext_s"] = "convnext_s"
    weights: Path | None = None

    def build(self) -> Perceptual:
        """Build it.

        Raises:
            UserError: torchvision or the weights are missing.
        """
        name, url = NETWORKS[self.network]
        path = weight_file(self.weights, option="weights", what=self.network, url=url)
        network = _torchvision_model(name)
        fill(network, read_checkpoint(path), path)
        return Perceptual(self, network)


class Perceptual(Loss):
    """Mean squared difference of the 1000 logits for reconstructions and images.

    Images are resized to 224 pixels, bilinear with antialiasing, and normalised.
    """

    def __init__(self, options: PerceptualOptions, network: nn.Module) -> None:
        super().__init__()
        self.options = options
        self.network = Frozen(network)
        self.prepared = Normalisation(SIZE)

    def forward(self, output: Reconstruction, images: Tensor, step: int) -> Tensor:
        """The mean over batch and logits."""
        with torch.no_grad():
            wanted = self.logits(images)
        return F.mse_loss(self.logits(output.images), wanted)

    def logits(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` in [-1, 1] to `(B, 1000)`."""
        logits: Tensor = self.network(self.prepared(images))
        return logits


def _torchvision_model(name: str) -> nn.Module:
    try:
        from torchvision import models  # type: ignore[import-untyped]
    except ImportError:
        raise UserError("the loss perceptual needs torchvision: pip install torchvision") from None
    # Made on the meta device and filled afterwards: the random start would be drawn for nothing, and from the
    # generator that the tokenizer's weights come from.
    with torch.device("meta"):
        model: Any = models.get_model(name, weights=None)
    return model.to_empty(device="cpu")  # type: ignore[no-any-return]
