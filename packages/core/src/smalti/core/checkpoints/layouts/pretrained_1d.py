"""1-D tokenizers whose encoder starts from a pretrained ViT, or is plain, and whose decoder is convolutional.

"1D-Tokenization for Image Reconstruction and Generation": the weights are those of its Lightning checkpoints.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from smalti.core.checkpoints.layout import CheckpointLayout, Shapes, count
from smalti.core.checkpoints.layouts.taming import side_rules
from smalti.core.checkpoints.layouts.vqgan_rules import LEGACY_WEIGHTS, decoder_ends_rules, levels_config
from smalti.core.checkpoints.rules import Rename, Rule

HEAD_WIDTH = 64
"""Of the attention of every ViT that these models start from."""


@dataclass(frozen=True)
class SplitPositions(Rule):
    """One published table `(1, n + N, D)` that is two here: of class token and grid `(n, D)`, of latents `(N, D)`.

    Args:
        published: name of the table.
        ours: names of the two.
        latents: N.
    """

    published: str
    ours: tuple[str, str]
    latents: int

    def to_ours(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """From the published name."""
        if self.published not in tensors:
            return {}
        table = tensors.pop(self.published).squeeze(0)
        parts = table.split([len(table) - self.latents, self.latents])
        return dict(zip(self.ours, parts, strict=True))

    def to_published(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """To the published name."""
        parts = [tensors.pop(name) for name in self.ours if name in tensors]
        return {self.published: torch.cat(parts).unsqueeze(0)} if len(parts) == len(self.ours) else {}


class _OneDimensional(CheckpointLayout):
    """What both encoders share: the quantizer, and the decoder."""

    ignored = ("latent_tokens", "post_quant_conv.*", "encoder.head.*", "loss.*")
    signature: ClassVar[tuple[str, ...]]

    def recognises(self, shapes: Shapes) -> bool:
        """The encoder's own names beside the convolutional decoder of tokens."""
        return {
            *self.signature,
            "decoder.latent_token_positional_embedding",
            "decoder.conv_in.weight",
            "decoder.decoder_embed.weight",
        } <= shapes.keys()

    @abstractmethod
    def encoder(self, shapes: Shapes) -> dict[str, Any]:
        """Options of the encoder."""

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """Sizes; normalisation eps and activation are the published ones, heads are 64 wide, grids square."""
        encoder = self.encoder(shapes)
        size, dim = shapes["quantize.embedding.weight"]
        return {
            "kind": "tokenizer",
            "options": {
                "name": "composed",
                "preprocessing": {"image_size": encoder["grid"][0] * encoder["patch"]},
                "encoder": encoder,
                "quantizer": {"name": "vq", "dim": dim, "codebook_size": size, "cosine": True, **LEGACY_WEIGHTS},
                "decoder": _decoder(shapes),
                "to_codes": "linear",
                "from_codes": "linear",
            },
        }

    def rules(self, config: Mapping[str, Any]) -> Sequence[Rule]:
        """The decoder's and the quantizer's; levels count from fine to coarse in the file, from coarse here."""
        reverse = {"level": len(config["options"]["decoder"]["multipliers"])}
        return [
            Rename("decoder.decoder_embed.*", "from_codes.*"),
            Rename("decoder.class_embedding", "decoder.embedding.class_token"),
            Rename("decoder.positional_embedding", "decoder.embedding.grid_positions"),
            Rename("decoder.latent_token_positional_embedding", "decoder.embedding.latent_positions"),
            Rename("decoder.mask_token", "decoder.mask", squeeze=1),
            *side_rules("decoder", "decoder.cnn", "up", reverse),
            *decoder_ends_rules(ours="decoder.cnn"),
            Rename("quantize.embedding.weight", "quantizer.codebook"),
        ]


class PretrainedStart(_OneDimensional):
    """The encoder that starts from MAE, CLIP, DINO, DINOv2 or Depth-Anything v2, in timm's names.

    Which one it was is not told, nor needed: all have the same architecture, without LayerScale and with the original's
    own normalisation eps.
    """

    name = "1d-pretrained"
    signature = ("encoder.prompt_tokens", "encoder.cls_token", "encoder.blocks.0.attn.qkv.weight", "ln.weight")

    def encoder(self, shapes: Shapes) -> dict[str, Any]:
        """A position for every token of the sequence."""
        tokens = shapes["encoder.prompt_tokens"][1]
        side = math.isqrt(shapes["encoder.pos_embed"][1] - 1 - tokens)
        return {
            **_encoder(shapes, "encoder.patch_embed.proj.weight", "encoder.blocks", "mlp.fc1.weight", side),
            "tokens": tokens,
            "class_token": "placed",
            "norm_eps": 1e-6,
        }

    def rules(self, config: Mapping[str, Any]) -> Sequence[Rule]:
        """Timm's names in the encoder."""
        block, ours = "encoder.blocks.{i}", "encoder.sequence.blocks.{i}"
        places = ("encoder.sequence.embedding.grid_positions", "encoder.sequence.embedding.latent_positions")
        return [
            Rename("encoder.cls_token", "encoder.sequence.embedding.class_token", squeeze=1),
            Rename("encoder.prompt_tokens", "encoder.latents", squeeze=1),
            SplitPositions("encoder.pos_embed", places, config["options"]["encoder"]["tokens"]),
            Rename("encoder.patch_embed.proj.*", "encoder.patches.projection.*"),
            Rename(f"{block}.norm1.*", f"{ours}.norm1.*"),
            Rename(f"{block}.attn.qkv.*", f"{ours}.attention.qkv.*"),
            Rename(f"{block}.attn.proj.*", f"{ours}.attention.out.*"),
            Rename(f"{block}.norm2.*", f"{ours}.norm2.*"),
            Rename(f"{block}.mlp.fc1.*", f"{ours}.mlp.0.*"),
            Rename(f"{block}.mlp.fc2.*", f"{ours}.mlp.2.*"),
            Rename("encoder.norm.*", "encoder.sequence.norm_post.*"),
            Rename("ln.*", "to_codes.*"),
            *super().rules(config),
        ]


class PlainStart(_OneDimensional):
    """The encoder without a pretrained start: tanh, no bias of query, key and value, TiTok's mixed order of numbers."""

    name = "1d-plain"
    signature = ("encoder.en_pos_embedding", "encoder.transformer.layers.0.0.fn.to_qkv.weight")

    def encoder(self, shapes: Shapes) -> dict[str, Any]:
        """The class token has no position, latent tokens have their own."""
        side = math.isqrt(shapes["encoder.en_pos_embedding"][1])
        layers = "encoder.transformer.layers"
        return {
            **_encoder(shapes, "encoder.to_patch_embedding.0.weight", layers, "1.fn.net.0.weight", side),
            "tokens": shapes["encoder.latent_tokens"][0],
            "class_token": "unplaced",
            "norm_eps": 1e-5,
            "qkv_bias": f"{layers}.0.0.fn.to_qkv.bias" in shapes,
            "activation": "tanh",
            "reread": True,
        }

    def select(self, tensors: Mapping[str, Tensor], *, ema: bool) -> Mapping[str, Tensor]:
        """Without the projection of the other encoder, which the file holds, too."""
        del ema
        return {name: tensor for name, tensor in tensors.items() if not name.startswith("ln.")}

    def rules(self, config: Mapping[str, Any]) -> Sequence[Rule]:
        """The encoder's own names."""
        layer, ours = "encoder.transformer.layers.{i}", "encoder.sequence.blocks.{i}"
        return [
            Rename("encoder.class_embedding", "encoder.sequence.embedding.class_token"),
            Rename("encoder.en_pos_embedding", "encoder.sequence.embedding.grid_positions", squeeze=1),
            Rename("encoder.latent_tokens", "encoder.latents"),
            Rename("encoder.latent_token_positional_embedding", "encoder.sequence.embedding.latent_positions"),
            Rename("encoder.to_patch_embedding.0.*", "encoder.patches.projection.*"),
            Rename(f"{layer}.0.norm.*", f"{ours}.norm1.*"),
            Rename(f"{layer}.0.fn.to_qkv.*", f"{ours}.attention.qkv.*"),
            Rename(f"{layer}.0.fn.to_out.*", f"{ours}.attention.out.*"),
            Rename(f"{layer}.1.norm.*", f"{ours}.norm2.*"),
            Rename(f"{layer}.1.fn.net.{{n}}.*", f"{ours}.mlp.{{n}}.*"),
            Rename("encoder.transformer.norm.*", "encoder.sequence.norm_post.*"),
            Rename("encoder.conv_out.*", "to_codes.*", pointwise=True),
            *super().rules(config),
        ]


def _encoder(shapes: Shapes, patch: str, blocks: str, hidden: str, side: int) -> dict[str, Any]:
    """What both encoders read off their entries.

    Args:
        shapes: of the published state dict.
        patch: the kernel of the patches.
        blocks: what the names of the blocks begin with.
        hidden: the first layer of a block's perceptron, within the block.
        side: of the grid.
    """
    width = shapes[patch][0]
    return {
        "name": "titok",
        "width": width,
        "layers": count(shapes, f"{blocks}.{{}}."),
        "heads": width // HEAD_WIDTH,
        "mlp_width": shapes[f"{blocks}.0.{hidden}"][0],
        "patch": shapes[patch][-1],
        "grid": (side, side),
        "norm_pre": False,
    }


def _decoder(shapes: Shapes) -> dict[str, Any]:
    side = math.isqrt(shapes["decoder.positional_embedding"][0] - 1)
    levels = [f"decoder.up.{level}.block.{{}}" for level in range(count(shapes, "decoder.up.{}."))]
    cnn = levels_config(shapes, None, levels, "attn")
    return {
        "name": "token-cnn",
        "width": shapes["decoder.conv_in.weight"][1],
        "tokens": shapes["decoder.latent_token_positional_embedding"][0],
        "grid": (side, side),
        "channels": cnn["width"],
        "multipliers": cnn["multipliers"],
        "blocks": cnn["blocks"],
        "attention_levels": cnn["attention_levels"],
    }
