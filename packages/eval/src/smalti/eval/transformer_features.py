"""DINOv2 and CLIP as feature spaces, through transformers.

Legend: B batch, H W pixels, D width of the features.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from smalti.core import weights
from smalti.core.backbones.pretrained import import_extra
from smalti.core.contracts import Features, check_pixels
from smalti.core.errors import UserError
from smalti.core.options import FeaturesOptions

Statistics = tuple[float, float, float]


class DINOv2Options(FeaturesOptions):
    """DINOv2's class token, the space of FD-DINOv2 (Stein et al. 2023).

    Args:
        model: a folder, or a hub repository; that of the paper by default.
    """

    name: Literal["dinov2"] = "dinov2"
    model: str = "facebook/dinov2-large"

    def build(self) -> Features:
        """Load it."""
        return DINOv2(self.model)


class CLIPOptions(FeaturesOptions):
    """CLIP's image embedding, the space of CMMD (Jayasumana et al. 2024).

    Args:
        model: a folder, or a hub repository; that of the paper by default.
    """

    name: Literal["clip"] = "clip"
    model: str = "openai/clip-vit-large-patch14-336"

    def build(self) -> Features:
        """Load it."""
        return CLIP(self.model)


class TransformerFeatures(Features):
    """Images resized to a square by Pillow (bicubic, antialiased, 8 bits), normalised, through a transformer.

    Attributes:
        side: of the square in pixels.
        mean: of each channel in [0, 1].
        std: of each channel.
    """

    mean: ClassVar[Statistics]
    std: ClassVar[Statistics]

    def __init__(self, network: Any, source: str, side: int) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.side = side
        self.source = source
        self.fingerprint = weights.fingerprint(network, {"side": side, "mean": self.mean, "std": self.std})

    @torch.inference_mode()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images uint8 `(B, H, W, 3)` to `{"pool": (B, D)}`, float32.

        Raises:
            UserError: images of another type or shape.
        """
        check_pixels(images)
        square = (self.side, self.side)
        resized = [
            np.asarray(Image.fromarray(image.numpy()).resize(square, Image.Resampling.BICUBIC))
            for image in images.cpu()
        ]
        values = torch.from_numpy(np.stack(resized)).to(images.device).movedim(-1, 1).float() / 255
        mean, std = (values.new_tensor(numbers)[:, None, None] for numbers in (self.mean, self.std))
        return {"pool": self.pooled((values - mean) / std).float()}

    @abstractmethod
    def pooled(self, values: Tensor) -> Tensor:
        """Normalised images `(B, 3, side, side)` to features `(B, D)`."""


class DINOv2(TransformerFeatures):
    """The class token after the last normalisation, of images of 224 pixels."""

    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)

    def __init__(self, source: str) -> None:
        super().__init__(_loaded("Dinov2Model", source), source, 224)

    def pooled(self, values: Tensor) -> Tensor:
        """The class token."""
        token: Tensor = self.network(values).last_hidden_state[:, 0]
        return token


class CLIP(TransformerFeatures):
    """The projected image embedding, of images of the size that the network was trained with."""

    mean = (0.48145466, 0.4578275, 0.40821073)
    std = (0.26862954, 0.26130258, 0.27577711)

    def __init__(self, source: str) -> None:
        network = _loaded("CLIPVisionModelWithProjection", source)
        super().__init__(network, source, network.config.image_size)

    def pooled(self, values: Tensor) -> Tensor:
        """The embedding, of the length that it has."""
        embedding: Tensor = self.network(values).image_embeds
        return embedding


def _loaded(kind: str, source: str) -> Any:
    transformers = import_extra("transformers")
    try:
        return getattr(transformers, kind).from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the weights of {source} are neither a folder here nor in the hub's cache, and could not be fetched "
            f"({type(error).__name__}): download https://huggingface.co/{source} "
            "and give its folder as extractor.model=FOLDER"
        ) from None
