"""Published tokenizers of Open-MAGVIT2 (Luo et al. 2024), from SEED-Voken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from smalti.core.checkpoints.layout import CheckpointLayout, Shapes, count
from smalti.core.checkpoints.layouts.vqgan_rules import (
    TRAINING,
    averaged_weights,
    decoder_ends_rules,
    encoder_ends_rules,
    levels_config,
    preprocessing,
    residual_rules,
)
from smalti.core.checkpoints.rules import Rename, Rule


class OpenMAGVIT2Layout(CheckpointLayout):
    """VQGAN without attention and without biases in its blocks, adaptive normalisation in the decoder, lookup-free.

    Its published figures were measured with the averaged weights.
    """

    name = "open-magvit2"
    ignored = TRAINING

    def recognises(self, shapes: Shapes) -> bool:
        """The adaptive normalisation beside images of two axes."""
        first = "encoder.conv_in.weight"
        return {first, "decoder.adaptive.0.gamma.weight"} <= shapes.keys() and len(shapes[first]) == 4

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """Everything: f = 16 is for images of 256 pixels, f = 8 for 128."""
        depth = count(shapes, "encoder.down.{}.")
        bits = shapes["encoder.conv_out.weight"][0]
        shared = {
            "name": "vqgan",
            "middle_blocks": count(shapes, "encoder.mid_block.{}."),
            "bias": False,
            "latent_width": bits,
        }
        encoder = [f"encoder.down.{level}.block.{{}}" for level in range(depth)]
        decoder = [f"decoder.up.{level}.block.{{}}" for level in range(depth)]
        return {
            "kind": "tokenizer",
            "options": {
                "name": "composed",
                "preprocessing": preprocessing(shapes, 16 * 2 ** (depth - 1)),
                "encoder": {
                    **levels_config(shapes, "encoder.conv_in", encoder, None),
                    **shared,
                    "downsampling": "symmetric",
                    "last_kernel": 1,
                },
                "quantizer": {"name": "lfq", "bits": [bits]},
                "decoder": {
                    **levels_config(shapes, None, decoder, None),
                    **shared,
                    "upsampling": "shuffle",
                    "adaptive": True,
                },
                "to_codes": "none",
                "from_codes": "none",
            },
        }

    def rules(self, config: Mapping[str, Any]) -> Sequence[Rule]:
        """Levels count from fine to coarse on both sides."""
        reverse = {"level": len(config["options"]["decoder"]["multipliers"])}
        down, fine_to_coarse = "encoder.down.{level}", "encoder.trunk.levels.{level}"
        up, coarse_to_fine = "decoder.up.{level}", "decoder.levels.{level}"
        return [
            *residual_rules(f"{down}.block.{{index}}", f"{fine_to_coarse}.blocks.{{index}}"),
            Rename(f"{down}.downsample.*", f"{fine_to_coarse}.resampling.conv.*"),
            *residual_rules("encoder.mid_block.{index}", "encoder.trunk.middle.{index}"),
            *residual_rules("decoder.mid_block.{index}", "decoder.middle.{index}"),
            Rename("decoder.adaptive.{level}.*", "decoder.adaptive.{level}.*", reverse),
            *residual_rules(f"{up}.block.{{index}}", f"{coarse_to_fine}.blocks.{{index}}", reverse),
            Rename(f"{up}.upsample.conv1.*", f"{coarse_to_fine}.resampling.conv.*", reverse),
            *encoder_ends_rules(),
            *decoder_ends_rules(),
        ]

    def select(self, tensors: Mapping[str, Tensor], *, ema: bool) -> Mapping[str, Tensor]:
        """Averaged weights where there are any."""
        return averaged_weights(tensors) if ema else tensors
