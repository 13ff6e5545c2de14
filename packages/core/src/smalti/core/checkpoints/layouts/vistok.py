"""Published tokenizers of visual-tokenizer-pytorch between convolutional networks: VQ-VAEs and VQGANs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from smalti.core.checkpoints.layout import CheckpointLayout, Shapes, count
from smalti.core.checkpoints.layouts.vqgan_rules import attention_rules, projection_rules
from smalti.core.checkpoints.rules import Rename, Rule

# FSQ leaves nothing in the weights but the number of channels: the published levels by it.
FSQ_LEVELS = {3: [8, 8, 8], 4: [8, 5, 5, 5], 5: [8, 8, 8, 6, 5]}

_RESIDUAL = {"block.0": "norm1", "block.2": "conv1", "block.3": "norm2", "block.6": "conv2", "shortcut": "shortcut"}


class VistokSimpleLayout(CheckpointLayout):
    """VQ-VAEs between the simple CNN; images of 64 pixels."""

    name = "vistok-vqvae"

    def recognises(self, shapes: Shapes) -> bool:
        """The encoder's names."""
        return {"encoder.downblocks.0.weight", "enc2code.weight"} <= shapes.keys()

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """Sizes; which quantizer as far as its weights tell, see `quantizer_config`."""
        width = shapes["encoder.downblocks.4.weight"][0]
        networks = {
            side: {"name": "simple-cnn", "width": width, "blocks": count(shapes, f"{side}.resblocks.{{}}.")}
            for side in ("encoder", "decoder")
        }
        return composed(64, networks, quantizer_config(shapes))

    def rules(self, config: Mapping[str, Any]) -> Sequence[Rule]:
        """Convolutions by their places among the activations."""
        convolutions = (("encoder.downblocks", "encoder", (0, 2, 4)), ("decoder.upblocks", "decoder", (1, 3, 5)))
        return [
            *(
                Rename(f"{published}.{place}.*", f"{ours}.convolutions.{index}.*")
                for published, ours, places in convolutions
                for index, place in enumerate(places)
            ),
            *(
                Rename(f"{side}.resblocks.{{block}}.blocks.{place}.weight", f"{side}.blocks.{{block}}.{ours}.weight")
                for side in ("encoder", "decoder")
                for place, ours in ((1, "conv1"), (3, "conv2"))
            ),
            *projection_rules(config["options"], "enc2code", "code2dec"),
            *quantizer_rules(config["options"]["quantizer"]),
        ]


class VistokVQGANLayout(CheckpointLayout):
    """VQGANs; images of 256 pixels."""

    name = "vistok-vqgan"

    def recognises(self, shapes: Shapes) -> bool:
        """The encoder's names."""
        return {"encoder.down_blocks.0.0.block.0.weight", "enc2code.weight"} <= shapes.keys()

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """Sizes; which quantizer as far as its weights tell, see `quantizer_config`."""
        depth = count(shapes, "encoder.down_blocks.{}.")
        networks = {}
        for side, part in (("encoder", "down_blocks"), ("decoder", "up_blocks")):
            order = range(depth) if side == "encoder" else reversed(range(depth))
            widths = [shapes[f"{side}.{part}.{level}.0.block.2.weight"][0] for level in order]
            unit = shapes["encoder.conv_in.weight"][0] if side == "encoder" else math.gcd(*widths)
            inner = range(count(shapes, f"{side}.{part}.0.{{}}."))
            networks[side] = {
                "name": "vqgan",
                "width": unit,
                "multipliers": [width // unit for width in widths],
                "blocks": sum(f"{side}.{part}.0.{index}.block.0.weight" in shapes for index in inner),
                "attention_eps": 1e-5,
            }
        networks["encoder"]["latent_width"] = shapes["encoder.out_block.2.weight"][0]
        networks["decoder"]["latent_width"] = shapes["decoder.in_block.weight"][1]
        quantizer = quantizer_config(shapes)
        if quantizer["name"] == "vq" and quantizer["dim"] == 8:  # LlamaGen's recipe
            quantizer |= {"cosine": True, "unit_length": "codes"}
        return composed(256, networks, quantizer)

    def rules(self, config: Mapping[str, Any]) -> Sequence[Rule]:
        """Blocks, attention and resampling of a level lie in one list, in the order in which they are applied."""
        options = config["options"]
        depth = len(options["encoder"]["multipliers"])
        return [
            *_level_rules("encoder.down_blocks", "encoder.trunk", options["encoder"]["blocks"], depth - 1),
            *_level_rules("decoder.up_blocks", "decoder", options["decoder"]["blocks"], 0),
            *_middle_rules("encoder", "encoder.trunk"),
            *_middle_rules("decoder", "decoder"),
            Rename("encoder.conv_in.*", "encoder.trunk.conv_in.*"),
            Rename("encoder.out_block.0.*", "encoder.head.norm.*"),
            Rename("encoder.out_block.2.*", "encoder.head.conv.*"),
            Rename("decoder.in_block.*", "decoder.conv_in.*"),
            Rename("decoder.conv_out.0.*", "decoder.head.norm.*"),
            Rename("decoder.conv_out.2.*", "decoder.head.conv.*"),
            *projection_rules(options, "enc2code", "code2dec"),
            *quantizer_rules(options["quantizer"]),
        ]


def composed(image_size: int, networks: Mapping[str, dict[str, Any]], quantizer: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the whole."""
    return {
        "kind": "tokenizer",
        "options": {
            "name": "composed",
            "preprocessing": {"image_size": image_size},
            "encoder": networks["encoder"],
            "quantizer": quantizer,
            "decoder": networks["decoder"],
            "to_codes": "linear",
            "from_codes": "linear",
        },
    }


def quantizer_config(shapes: Shapes) -> dict[str, Any]:
    """The quantizer's options, as far as its weights tell them.

    A codebook alone is VQ by distance, where it may also be VQ with codes of unit length, or IBQ. Without a codebook
    the published levels of FSQ are taken where they have as many channels, else LFQ.
    """
    dim = shapes["enc2code.weight"][0]
    names = [name for name in ("quantizer.codebook.weight", "quantizer._codebook.weight") if name in shapes]
    if not names:
        levels = FSQ_LEVELS.get(dim)
        if levels is not None:
            return {"name": "fsq", "levels": levels}
        return {"name": "lfq", "bits": [dim]}
    sizes = {"dim": dim, "codebook_size": shapes[names[0]][0]}
    if "quantizer.codebook_proj.weight" in shapes:
        return {"name": "simvq", **sizes, "bias": True}
    if "quantizer.ema_sumz" in shapes:
        return {"name": "vq", **sizes, "update": "ema", "ema_smoothing": False}
    return {"name": "vq", **sizes}


def quantizer_rules(quantizer: Mapping[str, Any]) -> list[Rule]:
    """For options that `quantizer_config` gave, or others with the same weights."""
    codebook = "quantizer.frozen" if quantizer["name"] == "simvq" else "quantizer.codebook"
    return [
        Rename("quantizer.codebook.weight", codebook),
        Rename("quantizer._codebook.weight", codebook),  # in October 2024
        Rename("quantizer.codebook_proj.*", "quantizer.transform.*"),
        Rename("quantizer.ema_sumz", "quantizer.learning.ema.sums"),
        Rename("quantizer.ema_sumn", "quantizer.learning.ema.counts"),
    ]


def _level_rules(published: str, ours: str, blocks: int, attending: int) -> list[Rule]:
    level = f"{ours}.levels.{{level}}"
    rules: list[Rule] = []
    for index in range(blocks):
        rules += [
            *_residual_rules(f"{published}.{attending}.{2 * index}", f"{ours}.levels.{attending}.blocks.{index}"),
            *attention_rules(
                f"{published}.{attending}.{2 * index + 1}", f"{ours}.levels.{attending}.attentions.{index}", out="proj"
            ),
        ]
    # The level with attention has the most entries, its resampling, where it has one, comes after them.
    rules.append(Rename(f"{published}.{attending}.{2 * blocks}.conv.*", f"{ours}.levels.{attending}.resampling.conv.*"))
    for index in range(blocks):
        rules += _residual_rules(f"{published}.{{level}}.{index}", f"{level}.blocks.{index}")
    return [*rules, Rename(f"{published}.{{level}}.{blocks}.conv.*", f"{level}.resampling.conv.*")]


def _middle_rules(published: str, ours: str) -> list[Rule]:
    middle = f"{published}.bottleneck_block"
    return [
        *attention_rules(f"{middle}.1", f"{ours}.middle.1", out="proj"),
        *_residual_rules(f"{middle}.{{index}}", f"{ours}.middle.{{index}}"),
    ]


def _residual_rules(published: str, ours: str) -> list[Rule]:
    return [Rename(f"{published}.{theirs}.*", f"{ours}.{layer}.*") for theirs, layer in _RESIDUAL.items()]
