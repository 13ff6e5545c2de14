"""Published tokenizers under the names of taming-transformers: VQGAN (Esser et al. 2021), IBQ, VAR's VQVAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from smalti.core.checkpoints.layout import CheckpointLayout, Shapes, count
from smalti.core.checkpoints.layouts.vqgan_rules import (
    LEGACY_WEIGHTS,
    AveragedLayout,
    Statistics,
    attention_rules,
    decoder_ends_rules,
    encoder_ends_rules,
    has_averaged_weights,
    levels_config,
    phi_convolutions,
    phi_rules,
    preprocessing,
    projection,
    projection_rules,
    residual_rules,
)
from smalti.core.checkpoints.rules import Rename, Rule

VAR_SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
"""VAR's grids for images of 256 pixels."""


class TamingLayout(AveragedLayout):
    """VQGAN of taming-transformers: the nearest code by distance.

    IBQ's files have the same names, but another search. They hold averaged weights; without these, names and shapes
    do not tell the two apart.
    """

    name = "taming-vqgan"

    def recognises(self, shapes: Shapes) -> bool:
        """Separate projections of attention, one codebook, no averaged weights."""
        return _is_taming(shapes) and not has_averaged_weights(shapes)

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """Sizes; images of 256 pixels."""
        size, dim = shapes["quantize.embedding.weight"]
        return _config(shapes, {"name": "vq", "dim": dim, "codebook_size": size, **LEGACY_WEIGHTS})

    def rules(self, config: Mapping[str, Any]) -> Sequence[Rule]:
        """The network and the codebook."""
        return [*_network_rules(config["options"]), Rename("quantize.embedding.weight", "quantizer.codebook")]


class IBQLayout(TamingLayout):
    """IBQ of SEED-Voken (Shi et al. 2024): taming's network, tokens by the largest inner product.

    Its published figures were measured with the averaged weights.
    """

    name = "ibq"

    def recognises(self, shapes: Shapes) -> bool:
        """Taming's names."""
        return _is_taming(shapes)

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """Sizes; images of 256 pixels."""
        size, dim = shapes["quantize.embedding.weight"]
        return _config(shapes, {"name": "ibq", "dim": dim, "codebook_size": size})


class VARLayout(CheckpointLayout):
    """VAR's multi-scale VQVAE (Tian et al. 2024): the three projections of attention are one convolution."""

    name = "var-vqvae"
    ignored = ("quantize.ema_vocab_hit_SV",)

    def recognises(self, shapes: Shapes) -> bool:
        """Fused projections of attention."""
        return {"encoder.down.0.block.0.conv1.weight", "encoder.mid.attn_1.qkv.weight"} <= shapes.keys()

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """Sizes; images and scales of 256 pixels, phi with a ratio of 0.5."""
        size, dim = shapes["quantize.embedding.weight"]
        quantizer = {
            "name": "multi-scale",
            "quantizer": {"name": "vq", "dim": dim, "codebook_size": size},
            "scales": list(VAR_SCALES),
            "phi": phi_convolutions(shapes, "quantize"),
        }
        return _config(shapes, quantizer)

    def rules(self, config: Mapping[str, Any]) -> Sequence[Rule]:
        """The network, the codebook, the phi convolutions, and the statistics that strict readers want."""
        options = config["options"]
        quantizer = options["quantizer"]
        scales, size = len(quantizer["scales"]), quantizer["quantizer"]["codebook_size"]
        return [
            *_network_rules(options, fused=True),
            Rename("quantize.embedding.weight", "quantizer.units.0.codebook"),
            *phi_rules(quantizer["phi"], scales, "quantize", "quantizer"),
            Statistics("quantize.ema_vocab_hit_SV", (scales, size)),
        ]


def _is_taming(shapes: Shapes) -> bool:
    return {
        "encoder.down.0.block.0.conv1.bias",
        "encoder.mid.attn_1.q.weight",
        "quantize.embedding.weight",
    } <= shapes.keys()


def _config(shapes: Shapes, quantizer: dict[str, Any]) -> dict[str, Any]:
    sides: dict[str, dict[str, Any]] = {}
    for side, part in (("encoder", "down"), ("decoder", "up")):
        levels = [f"{side}.{part}.{level}.block.{{}}" for level in range(count(shapes, f"{side}.{part}.{{}}."))]
        sides[side] = levels_config(shapes, "encoder.conv_in" if side == "encoder" else None, levels, "attn")
    return {
        "kind": "tokenizer",
        "options": {
            "name": "composed",
            "preprocessing": preprocessing(shapes, 256),
            "encoder": {"name": "vqgan", **sides["encoder"], "latent_width": shapes["encoder.conv_out.weight"][0]},
            "quantizer": quantizer,
            "decoder": {"name": "vqgan", **sides["decoder"], "latent_width": shapes["decoder.conv_in.weight"][1]},
            "to_codes": projection(shapes, "quant_conv"),
            "from_codes": projection(shapes, "post_quant_conv"),
        },
    }


def _network_rules(options: Mapping[str, Any], *, fused: bool = False) -> list[Rule]:
    """Everything but the quantizer; levels count from fine to coarse on both sides."""
    reverse = {"level": len(options["decoder"]["multipliers"])}
    return [
        *side_rules("encoder", "encoder.trunk", "down", {}, fused=fused),
        *side_rules("decoder", "decoder", "up", reverse, fused=fused),
        *encoder_ends_rules(),
        *decoder_ends_rules(),
        *projection_rules(options, "quant_conv", "post_quant_conv"),
    ]


def side_rules(
    published: str, network: str, part: str, reverse: Mapping[str, int], *, fused: bool = False
) -> list[Rule]:
    """Levels and middle of one network, without its ends.

    Args:
        published: its published name.
        network: ours.
        part: `down` or `up`, as its levels are called.
        reverse: as for `Rename`.
        fused: as for `attention_rules`.
    """
    level, ours = f"{published}.{part}.{{level}}", f"{network}.levels.{{level}}"
    return [
        *residual_rules(f"{level}.block.{{index}}", f"{ours}.blocks.{{index}}", reverse),
        *attention_rules(f"{level}.attn.{{index}}", f"{ours}.attentions.{{index}}", reverse, fused=fused),
        Rename(f"{level}.{part}sample.*", f"{ours}.resampling.*", reverse),
        *residual_rules(f"{published}.mid.block_1", f"{network}.middle.0"),
        *attention_rules(f"{published}.mid.attn_1", f"{network}.middle.1", fused=fused),
        *residual_rules(f"{published}.mid.block_2", f"{network}.middle.2"),
    ]
