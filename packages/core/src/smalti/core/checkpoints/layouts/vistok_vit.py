"""Published tokenizers of visual-tokenizer-pytorch between transformers: its one-stage TiTok and its ViT-VQGAN."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from smalti.core.checkpoints.layout import CheckpointLayout, Shapes, count
from smalti.core.checkpoints.layouts.vistok import composed, quantizer_config, quantizer_rules
from smalti.core.checkpoints.layouts.vqgan_rules import projection_rules
from smalti.core.checkpoints.rules import Rename, Rule

HEAD_WIDTH = 64  # of the attention, in every published configuration

# The parts of a transformer block in the published names, and in ours.
BLOCK = (("ln1", "norm1"), ("attn", "attention"), ("ln2", "norm2"), ("mlp", "mlp"))


class VistokTiTokLayout(CheckpointLayout):
    """TiTok without class token, trained in one stage."""

    name = "vistok-titok"

    def recognises(self, shapes: Shapes) -> bool:
        """The names of its learned tokens."""
        return {"encoder.latent_token_embed", "decoder.mask_pos_embed", "enc2code.weight"} <= shapes.keys()

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """Sizes, for square images; which quantizer as far as its weights tell."""
        side = math.isqrt(shapes["encoder.patch_pos_embed"][0])
        halves = {half: {"name": "titok", **_half(shapes, half, side)} for half in ("encoder", "decoder")}
        for half in halves.values():
            half |= {"class_token": "none", "tokens": shapes["encoder.latent_token_embed"][0]}
        halves["encoder"] |= {"latent_positions": False, "patch": _patch(shapes)}
        halves["decoder"]["head"] = {"name": "pixels", "patch": _patch(shapes)}
        return _config(shapes, halves)

    def rules(self, config: Mapping[str, Any]) -> Sequence[Rule]:
        """Learned tokens and positions, the rest as ViT-VQGAN."""
        return [
            Rename("encoder.patch_pos_embed", "encoder.sequence.embedding.grid_positions"),
            Rename("encoder.latent_token_embed", "encoder.latents"),
            Rename("decoder.pos_embed", "decoder.sequence.embedding.latent_positions"),
            Rename("decoder.mask_embed", "decoder.mask"),
            Rename("decoder.mask_pos_embed", "decoder.sequence.embedding.grid_positions"),
            *(
                Rename(f"{half}.{theirs}.*", f"{half}.sequence.{ours}.*")
                for half in ("encoder", "decoder")
                for theirs, ours in (("ln_pre", "norm_pre"), ("ln_post", "norm_post"))
            ),
            *_shared_rules(config),
        ]


class VistokViTVQGANLayout(CheckpointLayout):
    """ViT-VQGAN, of the branch `feature/vit-vqgan`."""

    name = "vistok-vit-vqgan"

    def recognises(self, shapes: Shapes) -> bool:
        """The names of its positions and of the perceptron after its blocks."""
        return {"encoder.pos_embed", "encoder.ffn.3.weight", "decoder.ln.weight", "enc2code.weight"} <= shapes.keys()

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """Sizes, for square images; which quantizer as far as its weights tell."""
        side = math.isqrt(shapes["encoder.pos_embed"][1])
        halves = {
            half: {"name": "vit-vqgan", **_half(shapes, half, side), "patch": _patch(shapes)}
            for half in ("encoder", "decoder")
        }
        return _config(shapes, halves)

    def rules(self, config: Mapping[str, Any]) -> Sequence[Rule]:
        """The first layer of the published perceptron is what ends our transformer."""
        return [
            *(
                rule
                for half in ("encoder", "decoder")
                for rule in (
                    Rename(f"{half}.pos_embed", f"{half}.sequence.embedding.grid_positions", squeeze=1),
                    Rename(f"{half}.ffn.0.*", f"{half}.sequence.norm_post.*"),
                    Rename(f"{half}.ffn.1.*", f"{half}.mlp.0.*"),
                    Rename(f"{half}.ffn.3.*", f"{half}.mlp.2.*"),
                )
            ),
            Rename("decoder.ln.*", "decoder.norm.*"),
            *_shared_rules(config),
        ]


def _half(shapes: Shapes, half: str, side: int) -> dict[str, Any]:
    hidden, width = shapes[f"{half}.blocks.0.mlp.0.weight"]
    return {
        "width": width,
        "layers": count(shapes, f"{half}.blocks.{{}}."),
        "heads": max(1, width // HEAD_WIDTH),
        "mlp_width": hidden,
        "qkv_bias": False,
        "grid": [side, side],
    }


def _patch(shapes: Shapes) -> int:
    return shapes["encoder.patch_embed.weight"][-1]


def _config(shapes: Shapes, halves: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    quantizer = quantizer_config(shapes)
    if quantizer["name"] == "vq":  # of both recipes
        quantizer |= {"cosine": True, "unit_length": "codes"}
    encoder = halves["encoder"]
    config = composed(encoder["patch"] * encoder["grid"][0], halves, quantizer)
    config["options"]["preprocessing"]["channels"] = shapes["decoder.out.2.weight"][0]
    return config


def _shared_rules(config: Mapping[str, Any]) -> list[Rule]:
    options = config["options"]
    return [
        Rename("encoder.patch_embed.*", "encoder.patches.projection.*"),
        *(
            Rename(f"{half}.blocks.{{block}}.{theirs}.*", f"{half}.sequence.blocks.{{block}}.{ours}.*")
            for half in ("encoder", "decoder")
            for theirs, ours in BLOCK
        ),
        Rename("decoder.out.0.*", "decoder.head.projection.*", pointwise=True),
        Rename("decoder.out.2.*", "decoder.head.smoothing.*"),
        *projection_rules(options, "enc2code", "code2dec"),
        *quantizer_rules(options["quantizer"]),
    ]
