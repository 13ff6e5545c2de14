"""TiTok's encoder, started from a pretrained vision transformer.

Legend: N latent tokens, D width, h w grid of patches.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from smalti.core.backbones.pretrained import Statistics, fill, image_statistics, load_vit, part
from smalti.core.backbones.titok import TiTokEncoder, TiTokEncoderOptions
from smalti.core.backbones.token_sequence import Count
from smalti.core.errors import UserError

# Entries of the encoder that no pretrained transformer has.
FRESH = ("latents", "sequence.embedding.latent_positions")


class PretrainedTiTokOptions(TiTokEncoderOptions):
    """Options of `TiTokEncoder` and of its start; the defaults are those of a ViT-B of MAE, DINO or DINOv2.

    What is built is a plain `titok` encoder, and its options say so: a saved tokenizer does not need the source again.

    Args:
        weights: where the encoder starts, a timm name (`vit_base_patch16_224.mae`), a hub repository or a path.
        start: `whole`, the encoder computes what the backbone does: positions are kept, LayerScale and the
            normalisation of images are multiplied into the weights beside them, latent tokens start as noise.
            `published`, as "1D-Tokenization for Image Reconstruction and Generation" did: positions and latent tokens
            start at zero, so that all latent tokens are alike at first; LayerScale and the normalisation before
            the first block are dropped; images are not normalised.
        mean: of the images in [0, 1] that the backbone was trained on; by default timm's for its names, and
            ImageNet's, which are not CLIP's, for all else.
        std: their standard deviation.
    """

    name: Literal["pretrained-titok"] = "pretrained-titok"  # type: ignore[assignment]
    width: Count = 768
    layers: Count = 12
    heads: Count = 12
    tokens: Count = 64
    norm_pre: bool = False
    norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    weights: str
    start: Literal["whole", "published"] = "whole"
    mean: Statistics | None = None
    std: Statistics | None = None

    def build(self, channels: int) -> TiTokEncoder:
        """Build it for images of 3 channels, with the weights of its source."""
        if channels != 3:
            raise UserError(f"a pretrained ViT takes images of 3 channels, not {channels}")
        own = {"weights", "start", "mean", "std", "name"}
        encoder = TiTokEncoder(TiTokEncoderOptions(**self.model_dump(exclude=own)), channels)
        loaded = load_vit(self.weights, width=self.width, depth=self.layers, patch_size=self.patch, grid=self.grid)
        loaded = _published(loaded, encoder) if self.start == "published" else self._whole(loaded)
        named = _named(loaded, encoder.sequence.embedding.class_placed)
        fill(encoder, named, self.weights, "titok", FRESH)
        return encoder

    def _whole(self, loaded: dict[str, Tensor]) -> dict[str, Tensor]:
        if "registers" in loaded:
            raise UserError(f"{self.weights} has register tokens, which titok has not: take the encoder timm")
        mean, std = image_statistics(self.weights)
        return _normalised(_scaled(loaded), self.mean or mean, self.std or std, self.image_range == "unit")


def _scaled(loaded: dict[str, Tensor]) -> dict[str, Tensor]:
    """LayerScale multiplied into the last layer of each branch: the same function without it."""
    loaded = dict(loaded)
    for name in [name for name in loaded if name.endswith((".scale1", ".scale2"))]:
        scale = loaded.pop(name)
        layer = f"{name.rpartition('.')[0]}.{'attention.out' if name.endswith('1') else 'mlp.2'}"
        loaded[f"{layer}.weight"] = scale[:, None] * loaded[f"{layer}.weight"]
        loaded[f"{layer}.bias"] = scale * loaded[f"{layer}.bias"]
    return loaded


def _normalised(loaded: dict[str, Tensor], mean: Statistics, std: Statistics, unit: bool) -> dict[str, Tensor]:
    """`(x - mean) / std`, of images in [0, 1], multiplied into the patch kernel; exact, as it sees no border."""
    weight = loaded["patch.weight"]
    deviation = torch.tensor(std, dtype=weight.dtype).view(1, 3, 1, 1)
    shift = (torch.tensor(0.0 if unit else 0.5) - torch.tensor(mean, dtype=weight.dtype)).view(1, 3, 1, 1)
    bias = (weight * shift / deviation).sum((1, 2, 3))
    return {
        **loaded,
        "patch.weight": weight / deviation * (1.0 if unit else 0.5),
        "patch.bias": bias + loaded.get("patch.bias", torch.zeros(len(weight))),
    }


def _published(loaded: dict[str, Tensor], encoder: TiTokEncoder) -> dict[str, Tensor]:
    """The original's loss of positions, scales and the first norm; what has no source starts at zero."""
    kept = {
        name: tensor
        for name, tensor in loaded.items()
        if not name.endswith((".scale1", ".scale2")) and not name.startswith(("norm_pre.", "registers"))
    }
    embedding = encoder.sequence.embedding
    with torch.no_grad():
        encoder.latents.zero_()
        if embedding.latent_positions is not None:
            embedding.latent_positions.zero_()
    kept["positions"] = torch.zeros_like(loaded["positions"])
    kept.setdefault("patch.bias", torch.zeros(len(loaded["patch.weight"])))
    return kept


def _named(loaded: dict[str, Tensor], class_placed: bool) -> dict[str, Tensor]:
    """Names of `load_vit` as those of `TiTokEncoder`."""
    named = {
        "sequence.embedding.grid_positions": loaded["positions"][0, 0 if class_placed else 1 :],
        **{f"patches.projection.{name}": tensor for name, tensor in part(loaded, "patch").items()},
        **{f"sequence.norm_post.{name}": tensor for name, tensor in part(loaded, "norm").items()},
        **{f"sequence.{name}": tensor for name, tensor in loaded.items() if name.startswith(("blocks.", "norm_pre."))},
    }
    if "class_token" in loaded:
        named["sequence.embedding.class_token"] = loaded["class_token"].squeeze(0)
    return named
