"""Published tokenizers of Open-MAGVIT2 (Luo et al. 2024), from SEED-Voken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from smalti.core.checkpoints.layout import Shapes, count
from smalti.core.checkpoints.layouts.vqgan_rules import (
    AveragedLayout,
    decoder_ends_rules,
    encoder_ends_rules,
    levels_config,
    preprocessing,
    residual_rules,
)
from smalti.core.checkpoints.rules import Rename, Rule


class OpenMAGVIT2Layout(AveragedLayout):
    """VQGAN without attention and without biases in its blocks, adaptive normalisation in the decoder, lookup-free.

    Its published figures were measured with the averaged weights.
    """

    name = "open-magvit2"

    def recognises(self, shapes: Shapes) -> bool:
        """The adaptive normalisation beside images of two axes."""
        first = "encoder.conv_in.weight"
        return {first, "decoder.adaptive.0.gamma.weight"} <= shapes.keys() and len(shapes[first]) == 4

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """Everything: f = 16 is for images of 256 pixels, f = 8 for 128."""
        depth = count(shapes, "encoder.down.{}.")
        bits = shapes["encoder.conv_out.weight"][0]
        return {
            "kind": "tokenizer",
            "options": {
                "name": "composed",
                "preprocessing": preprocessing(shapes, 16 * 2 ** (depth - 1)),
                **networks_config(shapes),
                "quantizer": {"name": "lfq", "bits": [bits]},
                "to_codes": "none",
                "from_codes": "none",
            },
        }

    def rules(self, config: Mapping[str, Any]) -> Sequence[Rule]:
        """Those of the networks; the quantizer has no weights."""
        return network_rules(config["options"])


def networks_config(shapes: Shapes, prefix: str = "") -> dict[str, Any]:
    """Options of encoder and decoder, whose published names are `prefix`, `encoder` and `decoder`."""
    encoder, decoder = f"{prefix}encoder", f"{prefix}decoder"
    depth = count(shapes, f"{encoder}.down.{{}}.")
    down = [f"{encoder}.down.{level}.block.{{}}" for level in range(depth)]
    up = [f"{decoder}.up.{level}.block.{{}}" for level in range(depth)]
    shared = {"name": "vqgan", "middle_blocks": count(shapes, f"{encoder}.mid_block.{{}}."), "bias": False}
    return {
        "encoder": {
            **levels_config(shapes, f"{encoder}.conv_in", down, None),
            **shared,
            "latent_width": shapes[f"{encoder}.conv_out.weight"][0],
            "downsampling": "symmetric",
            "last_kernel": 1,
        },
        "decoder": {
            **levels_config(shapes, None, up, None),
            **shared,
            "latent_width": shapes[f"{decoder}.conv_in.weight"][1],
            "upsampling": "shuffle",
            "adaptive": True,
        },
    }


def network_rules(options: Mapping[str, Any], prefix: str = "") -> list[Rule]:
    """Names of encoder and decoder; published levels count from fine to coarse on both sides."""
    encoder, decoder = f"{prefix}encoder", f"{prefix}decoder"
    reverse = {"level": len(options["decoder"]["multipliers"])}
    down, fine_to_coarse = f"{encoder}.down.{{level}}", "encoder.trunk.levels.{level}"
    up, coarse_to_fine = f"{decoder}.up.{{level}}", "decoder.levels.{level}"
    return [
        *residual_rules(f"{down}.block.{{index}}", f"{fine_to_coarse}.blocks.{{index}}"),
        Rename(f"{down}.downsample.*", f"{fine_to_coarse}.resampling.conv.*"),
        *residual_rules(f"{encoder}.mid_block.{{index}}", "encoder.trunk.middle.{index}"),
        *residual_rules(f"{decoder}.mid_block.{{index}}", "decoder.middle.{index}"),
        Rename(f"{decoder}.adaptive.{{level}}.*", "decoder.adaptive.{level}.*", reverse),
        *residual_rules(f"{up}.block.{{index}}", f"{coarse_to_fine}.blocks.{{index}}", reverse),
        Rename(f"{up}.upsample.conv1.*", f"{coarse_to_fine}.resampling.conv.*", reverse),
        *encoder_ends_rules(encoder),
        *decoder_ends_rules(decoder),
    ]
