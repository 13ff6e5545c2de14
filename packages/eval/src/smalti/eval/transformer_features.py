"""DINOv2 and CLIP as feature spaces, through transformers.

Legend: B batch, H W pixels, D width of the features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from smalti.core import weights
from smalti.core.backbones.pretrained import import_extra
from smalti.core.contracts import Features, check_pixels
from smalti.core.errors import UserError, few
from smalti.core.options import FeaturesOptions
from smalti.core.training.network_images import STATISTICS


class Family(NamedTuple):
    """What networks of one family have in common.

    Attributes:
        network: name of the class in transformers.
        mean: of each channel in [0, 1].
        std: of each channel.
        pooled: the network's output to features `(B, D)`.
        side: of the images in pixels; None is what the network was trained with.
    """

    network: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    pooled: Callable[[Any], Tensor]
    side: int | None = None


# The class token after the last normalisation.
DINOV2 = Family("Dinov2Model", *STATISTICS["imagenet"], lambda output: output.last_hidden_state[:, 0], 224)
# The projected embedding, of the length that it has.
CLIP = Family("CLIPVisionModelWithProjection", *STATISTICS["clip"], lambda output: output.image_embeds)


class DINOv2Options(FeaturesOptions):
    """DINOv2's class token, the space of FD-DINOv2 (Stein et al. 2023).

    Args:
        model: a folder, or a hub repository; that of the paper by default.
    """

    name: Literal["dinov2"] = "dinov2"
    model: str = "facebook/dinov2-large"

    def build(self) -> Features:
        """Load it."""
        return TransformerFeatures(DINOV2, self.model)


class CLIPOptions(FeaturesOptions):
    """CLIP's image embedding, the space of CMMD (Jayasumana et al. 2024).

    Args:
        model: a folder, or a hub repository; that of the paper by default.
    """

    name: Literal["clip"] = "clip"
    model: str = "openai/clip-vit-large-patch14-336"

    def build(self) -> Features:
        """Load it."""
        return TransformerFeatures(CLIP, self.model)


class TransformerFeatures(Features):
    """Images resized to a square by Pillow (bicubic, antialiased, 8 bits), normalised, through a transformer.

    Args:
        family: which network, and what it looks at.
        model: a folder, or a hub repository.

    Raises:
        UserError: there are no such weights, or they are those of another network.
    """

    def __init__(self, family: Family, model: str) -> None:
        super().__init__()
        self.family = family
        self.network = _loaded(family.network, model).eval().requires_grad_(False)
        self.side: int = family.side or self.network.config.image_size
        described = {"side": self.side, "mean": family.mean, "std": family.std}
        self.fingerprint = weights.fingerprint(self.network, described)

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
        mean, std = (values.new_tensor(numbers)[:, None, None] for numbers in (self.family.mean, self.family.std))
        return {"pool": self.family.pooled(self.network((values - mean) / std)).float()}


def _loaded(network: str, model: str) -> Any:
    transformers = import_extra("transformers")
    try:
        loaded, found = getattr(transformers, network).from_pretrained(model, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the weights of {model} are neither a folder here nor in the hub's cache, and could not be fetched "
            f"({type(error).__name__}): download https://huggingface.co/{model} "
            "and give its folder as extractor.model=FOLDER"
        ) from None
    except Exception as error:  # of damaged files, and of those of other networks, errors of many types come
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"{model} is damaged or holds no {network}: {problem}") from error
    if found["missing_keys"]:  # transformers would draw them by chance
        raise UserError(f"{model} is damaged or holds no {network}: it lacks {few(sorted(found['missing_keys']))}")
    return loaded
