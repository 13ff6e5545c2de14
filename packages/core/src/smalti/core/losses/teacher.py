"""A frozen teacher whose image features a tokenizer is aligned with.

Legend: B batch, C channels, H W pixels, N patches, T width of the teacher.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from smalti.core.backbones.vit_block import Activation
from smalti.core.options import Options
from smalti.core.training.frozen import Frozen
from smalti.core.training.frozen_vit import load_frozen_vit
from smalti.core.training.network_images import Normalisation, StatisticsOf


class TeacherOptions(Options):
    """Options of a teacher.

    Args:
        source: weights of a vision transformer: a timm name (`vit_small_patch14_dinov2.lvd142m`), a hub repository
            or a path.
        image_size: side of the images it sees in pixels; others are resized.
        patch_size: the patch kernel is resampled to it; null keeps the source's.
        resize: how; FQGAN takes `nearest`.
        statistics: mean and standard deviation that images are normalised with.
        feature: `class`, the class token; `patches`, those of the patches.
        final_norm: after the last norm, or before it (FQGAN with CLIP).
        activation: of the hidden layers; OpenAI's CLIP was trained with `quick-gelu`.
        eps: of the layer normalisations; 1e-6 in DINOv2, 1e-5 in CLIP.
    """

    source: str
    image_size: Annotated[int, Field(ge=1)] = 224
    patch_size: Annotated[int, Field(ge=1)] | None = None
    resize: Literal["nearest", "bilinear"] = "bilinear"
    statistics: StatisticsOf = "imagenet"
    feature: Literal["class", "patches"] = "class"
    final_norm: bool = True
    activation: Activation = "gelu"
    eps: Annotated[float, Field(gt=0)] = 1e-6

    def build(self) -> Teacher:
        """Build it.

        Raises:
            UserError: the weights cannot be had.
        """
        return Teacher(self)


class Teacher(nn.Module):
    """Images to the features of a frozen vision transformer.

    Attributes:
        width: T.
    """

    def __init__(self, options: TeacherOptions) -> None:
        super().__init__()
        self.options = options
        network = load_frozen_vit(
            options.source,
            image_size=options.image_size,
            patch_size=options.patch_size,
            activation=options.activation,
            eps=options.eps,
        )
        self.width = network.width
        self.depth = -1 if options.final_norm else len(network.blocks)
        self.network = Frozen(network)
        self.prepared = Normalisation(options.image_size, options.statistics, options.resize)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` in [-1, 1] to features `(B, 1, T)` of the class token or `(B, N, T)` of patches."""
        (tokens,) = self.network(self.prepared(images), (self.depth,))
        features: Tensor = tokens[:, :1] if self.options.feature == "class" else tokens[:, 1:]
        return features
