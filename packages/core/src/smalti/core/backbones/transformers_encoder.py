"""Vision towers of `transformers` as an encoder: the features of their patches as a grid.

Legend: B batch, H W pixels, p patch side, h w = H/p W/p grid, D width of the transformer.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from smalti.core.backbones.pretrained import IMAGENET, Statistics, import_extra
from smalti.core.backbones.tuning import TuningOptions, tune
from smalti.core.contracts import Encoder, check_images, grid_of
from smalti.core.errors import UserError
from smalti.core.files import read_json
from smalti.core.options import EncoderOptions

# They hide patches at random, in an order of their own.
MASKING = ("vit_mae", "videomae")


class TransformersEncoderOptions(TuningOptions, EncoderOptions):
    """Options of `TransformersEncoder`, beside those of tuning.

    Args:
        model: a hub repository (`openai/clip-vit-base-patch16`) or a folder of the same files.
        architecture: of the tower, as its `config.json` says it; null takes it and the weights from `model`. Once it
            is built the options have it: a saved tokenizer has its own weights and does not need the source again.
        mean: of the images in [0, 1] that the tower was trained on; by default what `preprocessor_config.json` says,
            else ImageNet's.
        std: their standard deviation.
    """

    name: Literal["transformers"] = "transformers"
    model: str
    architecture: dict[str, Any] | None = None
    mean: Statistics | None = None
    std: Statistics | None = None

    def build(self, channels: int) -> TransformersEncoder:
        """Build it for images of 3 channels."""
        return TransformersEncoder(self, channels)


class TransformersEncoder(Encoder):
    """A vision tower with its own normalisation of images; of CLIP and the like, the image half.

    The features are the tower's `last_hidden_state` without class and register tokens. What has no influence on them
    (poolers) is not trained.

    Attributes:
        backbone: the tower.
    """

    backbone: Any
    mean: Tensor
    std: Tensor

    def __init__(self, options: TransformersEncoderOptions, channels: int) -> None:
        super().__init__()
        if channels != 3:
            raise UserError(f"the transformers encoder takes images of 3 channels, not {channels}")
        self.backbone = _built(options)
        mean, std = _statistics(options)
        config = self.backbone.config
        self.width, self.patch = int(config.hidden_size), int(config.patch_size)
        self.options: TransformersEncoderOptions = options.model_copy(
            update={"architecture": json.loads(config.to_json_string()), "mean": mean, "std": std}
        )
        for name, statistics in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(statistics).view(1, 3, 1, 1), persistent=False)
        resizes = "interpolate_pos_encoding" in inspect.signature(self.backbone.forward).parameters
        self._arguments = {"interpolate_pos_encoding": True} if resizes else {}
        self._freeze_unused()
        tune(self.backbone, options)

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` in [-1, 1] to `(B, h, w, D)`."""
        check_images(images, 3)
        height, width = self.latent_space((images.shape[2], images.shape[3]))
        normalised = ((images + 1) / 2 - self.mean) / self.std
        tokens: Tensor = self.backbone(pixel_values=normalised, **self._arguments).last_hidden_state
        grid: Tensor = tokens[:, -height * width :].unflatten(1, (height, width))
        return grid

    def latent_space(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """`(h, w)`."""
        return grid_of(image_size, self.patch)

    def _freeze_unused(self) -> None:
        side = 2 * self.patch
        weights = list(self.backbone.parameters())
        self.eval()
        try:
            features = self.forward(torch.zeros(1, 3, side, side))
        except (RuntimeError, AttributeError, TypeError, ValueError):
            raise UserError(
                f"{self.options.model} gives no token per patch, which the transformers encoder needs"
            ) from None
        used = torch.autograd.grad(features.sum(), weights, allow_unused=True)
        for weight, gradient in zip(weights, used, strict=True):
            weight.requires_grad_(gradient is not None)
        self.train()


def _built(options: TransformersEncoderOptions) -> Any:
    transformers = import_extra("transformers")
    if options.architecture is not None:
        given = dict(options.architecture)
        kind = given.pop("model_type", None)
        if kind not in transformers.CONFIG_MAPPING:
            raise UserError(f"architecture: transformers knows no model_type {kind!r}; take over a tower's config.json")
        return transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **given))
    try:
        config = transformers.AutoConfig.from_pretrained(options.model)
        config = getattr(config, "vision_config", config)
        _check_kind(options.model, config)
        with _quiet(import_extra("transformers.utils.logging")):
            backbone, report = transformers.AutoModel.from_pretrained(
                options.model, config=config, output_loading_info=True, dtype=torch.float32
            )
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{options.model} could not be had: give a folder with config.json, preprocessor_config.json and "
            f"model.safetensors from https://huggingface.co/{options.model}, or a hub name that can be reached"
        ) from None
    except RuntimeError:
        raise UserError(f"the weights of {options.model} are of other shapes than its config.json says") from None
    missing = sorted(name for name in report["missing_keys"] if "pool" not in name)
    if missing:
        raise UserError(f"{options.model} does not hold the weights of its vision tower: it lacks {missing[0]}")
    return backbone


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """No table of the other half's weights, which are left out on purpose, and no progress bar of its own."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _check_kind(model: str, config: Any) -> None:
    if config.model_type in MASKING:
        raise UserError(f"{model} hides patches at random: take its weights with the encoder timm")
    if getattr(config, "backbone_config", None) is not None:
        raise UserError(f"{model} wraps a backbone: take its weights with the encoder timm, weights: {model}")
    if not hasattr(config, "patch_size") or not isinstance(config.patch_size, int):
        raise UserError(f"{model} gives no token per patch, which the transformers encoder needs")


def _statistics(options: TransformersEncoderOptions) -> tuple[Statistics, Statistics]:
    mean, std = options.mean, options.std
    if options.architecture is None and (mean is None or std is None):
        cached_file = import_extra("transformers.utils").cached_file
        path = cached_file(
            options.model,
            "preprocessor_config.json",
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        if path is not None:
            said = read_json(path, "how a vision tower takes images")
            mean, std = mean or said.get("image_mean"), std or said.get("image_std")
    return tuple(mean or IMAGENET[0]), tuple(std or IMAGENET[1])  # type: ignore[return-value]
