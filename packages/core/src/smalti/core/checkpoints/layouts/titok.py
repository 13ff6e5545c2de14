"""TiTok and TA-TiTok of ByteDance's 1d-tokenizer, with codebook or Gaussian posterior.

Legend: N latent tokens, D code width, We Wd widths of encoder and decoder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from smalti.core.checkpoints.layout import CheckpointLayout, Shapes, count
from smalti.core.checkpoints.layouts.clip_blocks import clip_block_rules
from smalti.core.checkpoints.layouts.maskgit_vqgan import decoder_config, decoder_rules
from smalti.core.checkpoints.rules import Rename, Rule

HEAD_WIDTH = 64  # of the attention, in every size
PIXELS = "pixel_decoder"


class TiTokLayout(CheckpointLayout):
    """The files of TiTok and TA-TiTok, after the second stage of training, the first, or the only one.

    The first models (`is_legacy`) end in logits over the codes of MaskGIT's VQGAN and read their latent tokens in a
    mixed order, see `smalti.core.backbones.titok.reread`.
    """

    name: ClassVar[str] = "titok"
    ignored: ClassVar[tuple[str, ...]] = ("quantize.embed_prob",)

    def recognises(self, shapes: Shapes) -> bool:
        """By the latent tokens and the transformers around them."""
        names = {"latent_tokens", "encoder.ln_pre.weight", "decoder.ln_pre.weight", "decoder.decoder_embed.weight"}
        return names <= shapes.keys()

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """Everything but the search by cosine, which only the first models have, and the weight of commitment."""
        legacy = "decoder.ffn.2.weight" in shapes
        width = shapes["decoder.decoder_embed.weight"][1]
        encoder, decoder = _half(shapes, "encoder"), _half(shapes, "decoder")
        channels, patch = shapes["encoder.patch_embed.weight"][1:3]
        options: dict[str, Any] = {
            "name": "composed",
            "preprocessing": {"image_size": patch * encoder["grid"][0], "channels": channels},
            "encoder": {**encoder, "patch": patch, "image_range": "unit", "reread": legacy},
            "decoder": {**decoder, "head": _proxy_head(shapes) if legacy else _pixel_head(shapes)},
        }
        if "decoder.text_guidance_proj.weight" in shapes:
            tokens = shapes["decoder.text_guidance_positional_embedding"][0]
            text_width = shapes["decoder.text_guidance_proj.weight"][1]
            options["decoder"] |= {"name": "text-titok", "text_tokens": tokens, "text_width": text_width}
        if shapes["encoder.conv_out.weight"][0] == 2 * width:
            return {"kind": "autoencoder", "options": {**options, "width": width}}
        codes, _ = shapes["quantize.embedding.weight"]
        options["quantizer"] = {"name": "vq", "dim": width, "codebook_size": codes, "cosine": legacy}
        return {"kind": "tokenizer", "options": options}

    def overrides(self, published: Mapping[str, Any]) -> list[str]:
        """What a published `config.json` tells beside names and shapes, as overrides of the options."""
        model = published.get("model", {}).get("vq_model", {})
        if model.get("quantize_mode", "vq") != "vq":
            return []
        known = {"use_l2_norm": "quantizer.cosine", "commitment_cost": "quantizer.commitment_weight"}
        return [f"{path}={str(model[key]).lower()}" for key, path in known.items() if key in model]

    def rules(self, config: Mapping[str, Any]) -> Sequence[Rule]:
        """The names of both halves, the quantizer, and the decoder of MaskGIT's VQGAN."""
        kl = config["kind"] == "autoencoder"
        return [
            Rename("latent_tokens", "encoder.latents"),
            Rename("encoder.patch_embed.*", "encoder.patches.projection.*"),
            Rename("encoder.conv_out.*", "to_moments.*" if kl else "to_codes.*", pointwise=True),
            *_half_rules("encoder", "encoder"),
            *_half_rules("decoder", "decoder"),
            Rename("decoder.mask_token", "decoder.mask", squeeze=1),
            Rename("decoder.decoder_embed.*", "from_latent.*" if kl else "from_codes.*"),
            Rename("decoder.text_guidance_proj.*", "decoder.from_text.*"),
            Rename("decoder.text_guidance_positional_embedding", "decoder.sequence.embedding.extra_positions"),
            Rename("quantize.embedding.weight", "quantizer.codebook"),
            *_head_rules(config["options"]["decoder"]["head"]),
        ]


def _half(shapes: Shapes, half: str) -> dict[str, Any]:
    positions, width = shapes[f"{half}.positional_embedding"]
    side = math.isqrt(positions - 1)
    return {
        "name": "titok",
        "width": width,
        "layers": count(shapes, f"{half}.transformer.{{}}."),
        "heads": max(1, width // HEAD_WIDTH),
        "mlp_width": shapes[f"{half}.transformer.0.mlp.c_fc.weight"][0],
        "grid": [side, side],
        "tokens": shapes[f"{half}.latent_token_positional_embedding"][0],
    }


def _half_rules(published: str, ours: str) -> list[Rule]:
    sequence = f"{ours}.sequence"
    return [
        Rename(f"{published}.class_embedding", f"{sequence}.embedding.class_token"),
        Rename(f"{published}.positional_embedding", f"{sequence}.embedding.grid_positions"),
        Rename(f"{published}.latent_token_positional_embedding", f"{sequence}.embedding.latent_positions"),
        Rename(f"{published}.ln_pre.*", f"{sequence}.norm_pre.*"),
        Rename(f"{published}.ln_post.*", f"{sequence}.norm_post.*"),
        *clip_block_rules(published, sequence),
    ]


def _pixel_head(shapes: Shapes) -> dict[str, Any]:
    channels = shapes["decoder.conv_out.weight"][0]
    patch = math.isqrt(shapes["decoder.ffn.0.weight"][0] // channels)
    return {"name": "pixels", "patch": patch, "image_range": "unit"}


def _proxy_head(shapes: Shapes) -> dict[str, Any]:
    codes = shapes["decoder.ffn.2.weight"][0]
    if f"{PIXELS}.conv_in.weight" not in shapes:
        return {"name": "logits", "codes": codes}
    return {"name": "proxy", "codes": codes, "decoder": decoder_config(shapes, PIXELS)}


def _head_rules(head: Mapping[str, Any]) -> list[Rule]:
    if head["name"] == "pixels":
        return [
            Rename("decoder.ffn.0.*", "decoder.head.projection.*", pointwise=True),
            Rename("decoder.conv_out.*", "decoder.head.smoothing.*"),
        ]
    rules: list[Rule] = [Rename("decoder.ffn.{layer}.*", "decoder.head.logits.{layer}.*", pointwise=True)]
    if head["name"] == "logits":
        return rules
    return [
        *rules,
        Rename("pixel_quantize.embedding.weight", "decoder.head.codebook"),
        *decoder_rules(head["decoder"], PIXELS, "decoder.head.decoder"),
    ]
