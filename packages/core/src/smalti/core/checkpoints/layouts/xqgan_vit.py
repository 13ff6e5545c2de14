"""XQ-GAN's tokenizers between vision transformers (ImageFolder, RobustTok): VQ, VP, MSVR and MSBR.

Legend: P branches, D width of the transformers, C width of one branch, n latent tokens of one branch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from smalti.core.backbones.pretrained import TIMM
from smalti.core.checkpoints.layout import CheckpointLayout, Shapes, count
from smalti.core.checkpoints.layouts.xqgan_quantizer import IGNORED, branches_of, quantizer_config, quantizer_rules
from smalti.core.checkpoints.rules import Rename, Rule

HEAD_WIDTH = 64  # of DINOv2 in every size


class XQGANViT(CheckpointLayout):
    """The tokenizer's state dict in XQ-GAN's files.

    `semantic_model`, `detail_model` and `sem_linear` are the frozen teachers of training, the `lvl1LC` tables follow
    from the layout.
    """

    name: ClassVar[str] = "xqgan-vit"
    ignored: ClassVar[tuple[str, ...]] = (
        *("semantic_model.*", "detail_model.*", "sem_linear.*", "encoder.lvl1LC", "decoder.lvl1LC"),
        *IGNORED,
    )

    def recognises(self, shapes: Shapes) -> bool:
        """By the latent tokens beside a ViT, and the projection to pixels."""
        return {"encoder.latent_tokens", "encoder.model.cls_token", "decoder.to_pixel.model.weight"} <= shapes.keys()

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """Everything but the list of scales, the kind of bits and phi's ratio, which have the published values."""
        branches = branches_of(shapes)
        code_width = shapes["quant_conv.weight"][0]
        _, channels, patch, _ = shapes["encoder.model.patch_embed.proj.weight"]
        image_size = patch * math.isqrt(shapes["encoder.model.pos_embed"][1] - 1)
        grid = math.isqrt(shapes["encoder.latent_tokens"][1] // branches)
        shared = {
            "name": "latent-grid-vit",
            "patch": patch,
            "image_size": image_size,
            "grid": grid,
            "positions": "learned" if "encoder.latent_pos_embed" in shapes else "shared",
            "drop_path": 0.1,
        }
        options = {
            "name": "composed",
            "preprocessing": {"image_size": image_size, "channels": channels},
            "encoder": {**shared, **_size(shapes, "encoder"), "branches": branches, "code_width": code_width},
            "quantizer": quantizer_config(shapes, code_width, grid),
            "decoder": {**shared, **_size(shapes, "decoder")},
            "to_codes": "none",
        }
        return {"kind": "tokenizer", "options": options}

    def rules(self, config: Mapping[str, Any]) -> Sequence[Rule]:
        """The names of timm's ViT, and XQ-GAN's around them."""
        return [
            Rename("encoder.model.patch_embed.proj.*", "encoder.patches.*"),
            Rename("encoder.latent_tokens", "encoder.latent_tokens"),
            Rename("quant_conv.*", "encoder.to_code.*", pointwise=True),
            Rename("post_quant_conv.*", "from_codes.*", pointwise=True),
            Rename("decoder.mask_token", "decoder.mask_token"),
            Rename("decoder.to_pixel.model.*", "decoder.to_pixels.*"),
            Rename("{part}.lvl_embed.weight", "{part}.levels"),
            Rename("{part}.latent_pos_embed", "{part}.latent_positions"),
            *(Rename(f"{{part}}.model.{rule.published}", f"{{part}}.transformer.{rule.ours}") for rule in TIMM),
            *quantizer_rules(config["options"]["quantizer"]),
        ]


def _size(shapes: Shapes, part: str) -> dict[str, int]:
    width = shapes[f"{part}.model.cls_token"][-1]
    return {"width": width, "depth": count(shapes, f"{part}.model.blocks.{{}}."), "heads": width // HEAD_WIDTH}
