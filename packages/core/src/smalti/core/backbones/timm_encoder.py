"""Any vision transformer of timm as an encoder: its features as a grid, or latent tokens that read them.

Legend: B batch, H W pixels, p patch side, h w = H/p W/p grid, N latent tokens, D width of the transformer.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from smalti.core.backbones.pretrained import import_extra, vit_tensors
from smalti.core.backbones.token_sequence import Count, learned
from smalti.core.backbones.tuning import TuningOptions, tune
from smalti.core.contracts import Encoder, check_images, grid_of
from smalti.core.errors import UserError
from smalti.core.options import EncoderOptions


class TimmEncoderOptions(TuningOptions, EncoderOptions):
    """Options of `TimmEncoder`, beside those of tuning.

    Args:
        model: timm's name of the architecture, with or without the tag of its weights.
        weights: `published`, those of the model's tag, from the hub or its cache; a path or a hub repository; null
            starts from random ones. Once it is built the options say null: a saved tokenizer has its own.
        image_size: side of the square images that the learned positions are resampled for; other sizes are
            resampled at every use.
        patch: side of a patch; by default the model's own. The kernel is resampled.
        latents: N, tokens that are appended to the patches and leave as the latent; null gives the features of the
            patches.
    """

    name: Literal["timm"] = "timm"
    model: str
    weights: str | None = "published"
    image_size: Count = 256
    patch: Count | None = None
    latents: Count | None = None

    def build(self, channels: int) -> TimmEncoder:
        """Build it for images of 3 channels."""
        return TimmEncoder(self, channels)


class TimmEncoder(Encoder):
    """A vision transformer of timm with its own normalisation of images, positions and LayerScale.

    Attributes:
        backbone: timm's module, without its head.
        latents: `(1, N, D)`, where there are latent tokens.
    """

    backbone: Any
    mean: Tensor
    std: Tensor

    def __init__(self, options: TimmEncoderOptions, channels: int) -> None:
        super().__init__()
        if channels != 3:
            raise UserError(f"the timm encoder takes images of 3 channels, not {channels}")
        self.backbone = _built(options)
        plain = isinstance(self.backbone, _kind("vision_transformer", "VisionTransformer"))
        if options.latents is not None and not plain:
            raise UserError(
                f"latent tokens need a plain ViT of timm, {options.model} is another kind: set latents: null"
            )
        self.options: TimmEncoderOptions = options.model_copy(update={"weights": None})
        self.width = int(self.backbone.num_features)
        self.patch = int(self.backbone.patch_embed.patch_size[0])
        for name in ("mean", "std"):
            statistics = torch.tensor(self.backbone.pretrained_cfg[name]).view(1, 3, 1, 1)
            self.register_buffer(name, statistics, persistent=False)
        self.latents = learned(1, options.latents, self.width) if options.latents is not None else None
        tune(self.backbone, options)

    def forward(self, images: Tensor) -> Tensor:
        """Images `(B, 3, H, W)` in [-1, 1] to `(B, h, w, D)` or `(B, N, D)`, after the last normalisation."""
        check_images(images, 3)
        height, width = grid_of((images.shape[2], images.shape[3]), self.patch)
        images = ((images + 1) / 2 - self.mean) / self.std
        if self.latents is None:
            tokens: Tensor = self.backbone.fc_norm(self.backbone.forward_features(images))
            grid: Tensor = tokens[:, -height * width :].unflatten(1, (height, width))
            return grid
        tokens = self.backbone._pos_embed(self.backbone.patch_embed(images))
        tokens = torch.cat([tokens, self.latents.expand(len(tokens), -1, -1)], dim=1)
        tokens = self.backbone.norm(self.backbone.blocks(self.backbone.norm_pre(tokens)))
        features: Tensor = self.backbone.fc_norm(tokens[:, -self.latents.shape[1] :])
        return features

    def latent_space(self, image_size: tuple[int, int]) -> tuple[int, ...]:
        """`(N,)`, or `(h, w)` without latent tokens."""
        grid = grid_of(image_size, self.patch)
        return grid if self.latents is None else (self.latents.shape[1],)


def _built(options: TimmEncoderOptions) -> Any:
    timm = import_extra("timm")
    if not timm.is_model(options.model):
        raise UserError(f"timm has no model called {options.model}")
    arguments: dict[str, Any] = {"num_classes": 0, "img_size": options.image_size, "dynamic_img_size": True}
    if options.patch is not None:
        arguments["patch_size"] = options.patch
    source = options.model if options.weights == "published" else options.weights
    if source is not None:
        arguments["pretrained"] = True
        arguments["pretrained_cfg_overlay"] = {"state_dict": vit_tensors(source)}
    other_kind = f"{options.model} is no ViT with one grid of patches, which the timm encoder needs"
    try:
        backbone = timm.create_model(options.model, **arguments)
    except (TypeError, AssertionError):
        raise UserError(other_kind) from None
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"the weights of {source} do not fit {options.model}: {reason}") from None
    kinds = (_kind("vision_transformer", "VisionTransformer"), _kind("eva", "Eva"))
    if not isinstance(backbone, kinds):
        raise UserError(other_kind)
    vit: Any = backbone
    vit.reset_classifier(0, "")
    vit.pretrained_cfg.pop("state_dict", None)  # the loaded tensors, which nobody needs twice
    return vit


def _kind(module: str, name: str) -> type[nn.Module]:
    kind: type[nn.Module] = getattr(import_extra(f"timm.models.{module}"), name)
    return kind
