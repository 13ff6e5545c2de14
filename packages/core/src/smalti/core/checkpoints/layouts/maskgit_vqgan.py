"""The published VQGAN of MaskGIT (Chang et al. 2022) as it was converted to PyTorch; TiTok and RAR build on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from smalti.core.checkpoints.layout import CheckpointLayout, Shapes, count
from smalti.core.checkpoints.layouts.vqgan_rules import (
    LEGACY_WEIGHTS,
    decoder_ends_rules,
    encoder_ends_rules,
    levels_config,
    preprocessing,
    residual_rules,
)
from smalti.core.checkpoints.rules import Rename, Rule

# Of encoder and decoder. The shortcut is a defect that the weights were trained with.
_SHARED = {"name": "vqgan", "bias": False, "shortcut": "output", "image_range": "unit"}


class MaskGITVQGANLayout(CheckpointLayout):
    """No attention, average pooling, a shortcut of its own, images in [0, 1]."""

    name = "maskgit-vqgan"

    def recognises(self, shapes: Shapes) -> bool:
        """The name of its upsampling."""
        return {"encoder.conv_in.weight", "decoder.up.1.upsample_conv.weight"} <= shapes.keys()

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """Sizes; images of 256 pixels."""
        size, dim = shapes["quantize.embedding.weight"]
        levels = [f"encoder.down.{level}.block.{{}}" for level in range(count(shapes, "encoder.down.{}."))]
        encoder = {
            **levels_config(shapes, "encoder.conv_in", levels, None),
            **_SHARED,
            "middle_blocks": count(shapes, "encoder.mid.{}."),
            "latent_width": shapes["encoder.conv_out.weight"][0],
            "downsampling": "average",
            "last_kernel": 1,
        }
        return {
            "kind": "tokenizer",
            "options": {
                "name": "composed",
                "preprocessing": preprocessing(shapes, 256),
                "encoder": encoder,
                "quantizer": {"name": "vq", "dim": dim, "codebook_size": size, **LEGACY_WEIGHTS},
                "decoder": decoder_config(shapes),
                "to_codes": "none",
                "from_codes": "none",
            },
        }

    def rules(self, config: Mapping[str, Any]) -> Sequence[Rule]:
        """Levels count from fine to coarse on both sides."""
        level, ours = "encoder.down.{level}.block.{index}", "encoder.trunk.levels.{level}.blocks.{index}"
        return [
            *residual_rules(level, ours),
            *residual_rules("encoder.mid.{index}", "encoder.trunk.middle.{index}"),
            *encoder_ends_rules(),
            *decoder_rules(config["options"]["decoder"]),
            Rename("quantize.embedding.weight", "quantizer.codebook"),
        ]


def decoder_config(shapes: Shapes, published: str = "decoder") -> dict[str, Any]:
    """Options of the decoder, which TiTok holds, too, under a name of its own."""
    levels = [f"{published}.up.{level}.block.{{}}" for level in range(count(shapes, f"{published}.up.{{}}."))]
    return {
        **levels_config(shapes, None, levels, None),
        **_SHARED,
        "middle_blocks": count(shapes, f"{published}.mid.{{}}."),
        "latent_width": shapes[f"{published}.conv_in.weight"][1],
    }


def decoder_rules(options: Mapping[str, Any], published: str = "decoder", ours: str = "decoder") -> list[Rule]:
    """The decoder's names, for options that `decoder_config` gave."""
    reverse = {"level": len(options["multipliers"])}
    level = f"{ours}.levels.{{level}}"
    return [
        *residual_rules(f"{published}.mid.{{index}}", f"{ours}.middle.{{index}}"),
        *residual_rules(f"{published}.up.{{level}}.block.{{index}}", f"{level}.blocks.{{index}}", reverse),
        Rename(f"{published}.up.{{level}}.upsample_conv.*", f"{level}.resampling.conv.*", reverse),
        *decoder_ends_rules(published, ours),
    ]
