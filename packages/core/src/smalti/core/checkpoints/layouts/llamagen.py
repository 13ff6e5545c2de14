"""Published tokenizers under LlamaGen's names: LlamaGen's VQ-8 and VQ-16 (Sun et al. 2024), XQ-GAN's CNN form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from smalti.core.checkpoints.layout import CheckpointLayout, Shapes, count
from smalti.core.checkpoints.layouts.vqgan_rules import (
    Statistics,
    attention_rules,
    decoder_ends_rules,
    levels_config,
    preprocessing,
    projection_rules,
    residual_rules,
)
from smalti.core.checkpoints.layouts.xqgan_quantizer import IGNORED, quantizer_config, quantizer_rules
from smalti.core.checkpoints.rules import Rename, Rule

USAGE_WINDOW = 65536
"""How many of the latest tokens the original keeps to tell the usage of its codebook."""


class LlamaGenLayout(CheckpointLayout):
    """LlamaGen's tokenizers; an L2-normalised codebook."""

    name = "llamagen-vq"
    container = "model"
    ignored = ("quantize.codebook_used",)

    def recognises(self, shapes: Shapes) -> bool:
        """A single encoder head and a single codebook, without XQ-GAN's statistics."""
        return _is_convolutional(shapes) and _XQGAN not in shapes

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """Sizes; images of 256 pixels."""
        size, dim = shapes["quantize.embedding.weight"]
        quantizer = {"name": "vq", "dim": dim, "codebook_size": size, "cosine": True}
        return {"kind": "tokenizer", "options": cnn_options(shapes) | {"quantizer": quantizer}}

    def rules(self, config: Mapping[str, Any]) -> Sequence[Rule]:
        """One set of names for encoder and decoder, and the codebook."""
        return [
            *cnn_rules(config["options"]),
            Rename("quantize.embedding.weight", "quantizer.codebook"),
            Statistics("quantize.codebook_used", (USAGE_WINDOW,)),
        ]


class XQGANConvolutionalLayout(CheckpointLayout):
    """XQ-GAN with convolutional encoder and decoder (Li et al. 2024): LlamaGen's, with one of XQ-GAN's quantizers."""

    name = "xqgan-cnn"
    ignored = IGNORED

    def recognises(self, shapes: Shapes) -> bool:
        """As LlamaGen's, with XQ-GAN's statistics."""
        return _is_convolutional(shapes) and _XQGAN in shapes

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """Sizes; images of 256 pixels, and what `quantizer_config` takes as published."""
        options = cnn_options(shapes)
        factor = 2 ** (len(options["encoder"]["multipliers"]) - 1)
        width = shapes["quant_conv.weight"][0]
        quantizer = quantizer_config(shapes, width, options["preprocessing"]["image_size"] // factor)
        return {"kind": "tokenizer", "options": options | {"quantizer": quantizer}}

    def rules(self, config: Mapping[str, Any]) -> Sequence[Rule]:
        """LlamaGen's names, and XQ-GAN's of the quantizer."""
        options = config["options"]
        return [*cnn_rules(options), *quantizer_rules(options["quantizer"])]


_XQGAN = "quantize.ema_vocab_hit_SV"


def _is_convolutional(shapes: Shapes) -> bool:
    return {"encoder.conv_blocks.0.res.0.conv1.weight", "encoder.conv_out.weight"} <= shapes.keys()


def cnn_options(shapes: Shapes) -> dict[str, Any]:
    """Options of a composed tokenizer under LlamaGen's names, without the quantizer."""
    encoder = trunk_config(shapes)
    return {
        "name": "composed",
        "preprocessing": preprocessing(shapes, 256),
        "encoder": {"name": "vqgan", **encoder, "latent_width": shapes["encoder.conv_out.weight"][0]},
        "decoder": decoder_config(shapes),
        "to_codes": "linear",
        "from_codes": "linear",
    }


def trunk_config(shapes: Shapes) -> dict[str, Any]:
    """Options of the encoder's trunk, which FQGAN has, too."""
    levels = [f"encoder.conv_blocks.{level}.res.{{}}" for level in range(count(shapes, "encoder.conv_blocks.{}."))]
    return levels_config(shapes, "encoder.conv_in", levels, "attn")


def decoder_config(shapes: Shapes) -> dict[str, Any]:
    """Options of the decoder, which FQGAN has, too."""
    depth = count(shapes, "decoder.conv_blocks.{}.")
    levels = [f"decoder.conv_blocks.{depth - 1 - level}.res.{{}}" for level in range(depth)]
    config = levels_config(shapes, None, levels, "attn")
    return {"name": "vqgan", **config, "latent_width": shapes["decoder.conv_in.weight"][1]}


def cnn_rules(options: Mapping[str, Any]) -> list[Rule]:
    """Everything but the quantizer."""
    return [
        *trunk_rules(),
        Rename("encoder.norm_out.*", "encoder.head.norm.*"),
        Rename("encoder.conv_out.*", "encoder.head.conv.*"),
        *decoder_rules(),
        *projection_rules(options, "quant_conv", "post_quant_conv"),
    ]


def trunk_rules() -> list[Rule]:
    """The encoder's trunk, which FQGAN has, too."""
    return [
        Rename("encoder.conv_in.*", "encoder.trunk.conv_in.*"),
        *_level_rules("encoder", "encoder.trunk", "downsample"),
    ]


def decoder_rules() -> list[Rule]:
    """The decoder, which FQGAN has, too."""
    return [*_level_rules("decoder", "decoder", "upsample"), *decoder_ends_rules()]


def _level_rules(published: str, ours: str, resampling: str) -> list[Rule]:
    level, block = f"{published}.conv_blocks.{{level}}", f"{ours}.levels.{{level}}"
    return [
        *residual_rules(f"{level}.res.{{index}}", f"{block}.blocks.{{index}}"),
        *attention_rules(f"{level}.attn.{{index}}", f"{block}.attentions.{{index}}"),
        Rename(f"{level}.{resampling}.*", f"{block}.resampling.*"),
        *attention_rules(f"{published}.mid.1", f"{ours}.middle.1"),
        *residual_rules(f"{published}.mid.{{index}}", f"{ours}.middle.{{index}}"),
    ]
