"""FQGAN's factorized tokenizers, dual and triple (Bai et al. 2024), which have LlamaGen's trunk and decoder.

Legend: A places of the adapters' positions, f downsampling factor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from smalti.core.checkpoints.layout import CheckpointLayout, Shapes, count
from smalti.core.checkpoints.layouts.clip_blocks import clip_block_rules
from smalti.core.checkpoints.layouts.llamagen import decoder_config, decoder_rules, trunk_config, trunk_rules
from smalti.core.checkpoints.rules import Rename, Rule

# In the order of channels and streams; the adapters' names; those of the heads for training.
BRANCHES = (("vis", "sem"), ("vis", "sem_mid", "sem_high"))
ADAPTERS = {
    "vis": "visual_head",
    "sem": "semantic_head",
    "sem_mid": "semantic_head_mid",
    "sem_high": "semantic_head_high",
}
FEATURE_HEADS = {"sem": "feat_pred_head", "sem_mid": "mid_sem_feat_pred", "sem_high": "high_sem_feat_pred"}
TRANSFORMER_HEADS = 8


class FQGAN(CheckpointLayout):
    """The tokenizer; the heads that predict features in training are left out."""

    name: ClassVar[str] = "fqgan"
    ignored: ClassVar[tuple[str, ...]] = (
        "quantize_*.codebook_used",
        *(f"{head}.*" for head in FEATURE_HEADS.values()),
    )

    def recognises(self, shapes: Shapes) -> bool:
        """By the visual branch."""
        return "quant_conv_vis.weight" in shapes and "encoder.visual_head.0.positional_embedding" in shapes

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """Everything but the weights of the losses, which are those of the published training."""
        branches = _branches(shapes)
        size, code_width = shapes["quantize_vis.embedding.weight"]
        trunk = trunk_config(shapes)
        places = shapes["encoder.visual_head.0.positional_embedding"][0]
        image_size = math.isqrt(places) * 2 ** (len(trunk["multipliers"]) - 1)
        unit = {"name": "vq", "dim": code_width, "codebook_size": size, "cosine": True, "entropy_weight": 0.03}
        options = {
            "name": "composed",
            "preprocessing": {"image_size": image_size},
            "encoder": {
                "name": "branched-vqgan",
                **trunk,
                "branches": list(branches),
                "image_size": image_size,
                "adapter_depth": count(shapes, "encoder.visual_head.0.transformer.{}."),
                "adapter_heads": TRANSFORMER_HEADS,
                "latent_width": shapes["quant_conv_vis.weight"][1],
                "code_width": code_width,
            },
            "quantizer": {
                "name": "factorized",
                "quantizers": [unit],
                "branches": len(branches),
                "disentanglement_weight": 0.1,
            },
            "decoder": decoder_config(shapes),
            "to_codes": "none",
        }
        return {"kind": "tokenizer", "options": options}

    def rules(self, config: Mapping[str, Any]) -> Sequence[Rule]:
        """LlamaGen's trunk and decoder, and the branches by name."""
        rules: list[Rule] = [
            *trunk_rules(),
            *decoder_rules(),
            Rename("post_quant_conv.*", "from_codes.*", pointwise=True),
        ]
        for number, branch in enumerate(config["options"]["encoder"]["branches"]):
            ours = f"encoder.branches.{branch}"
            rules += [
                *_transformer_rules(f"encoder.{ADAPTERS[branch]}.0", f"{ours}.adapter"),
                Rename(f"encoder.norm_out_{branch}.*", f"{ours}.head.norm.*"),
                Rename(f"encoder.conv_out_{branch}.*", f"{ours}.head.conv.*"),
                Rename(f"quant_conv_{branch}.*", f"{ours}.to_code.*", pointwise=True),
                Rename(f"quantize_{branch}.embedding.weight", f"quantizer.product.units.{number}.codebook"),
            ]
        return rules


class FQGANWithFeatureHeads(FQGAN):
    """The tokenizer with the heads that predict features, to go on training it; to be asked for by name."""

    name: ClassVar[str] = "fqgan-with-feature-heads"
    ignored: ClassVar[tuple[str, ...]] = ("quantize_*.codebook_used",)

    def recognises(self, shapes: Shapes) -> bool:
        """Never by itself: the layout `fqgan` reads the same files without these heads."""
        return False

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """As for the tokenizer; what a head's width and depth are follows from shapes."""
        config = super().config(shapes)
        width = config["options"]["encoder"]["code_width"]
        heads = {
            branch: {
                "first": number * width,
                "channels": width,
                "width": shapes[f"{FEATURE_HEADS[branch]}.class_embedding"][-1],
                "depth": count(shapes, f"{FEATURE_HEADS[branch]}.transformer.{{}}."),
                "heads": TRANSFORMER_HEADS,
            }
            for number, branch in enumerate(_branches(shapes))
            if branch in FEATURE_HEADS
        }
        config["options"] |= {"name": "feature-predicting", "feature_heads": heads}
        return config

    def rules(self, config: Mapping[str, Any]) -> Sequence[Rule]:
        """As for the tokenizer, and those of the heads."""
        rules = [*super().rules(config)]
        for branch in config["options"]["feature_heads"]:
            published, ours = FEATURE_HEADS[branch], f"feature_heads.{branch}"
            rules += [
                Rename(f"{published}.class_embedding", f"{ours}.class_embedding"),
                Rename(f"{published}.upscale.*", f"{ours}.widen.*"),
                *_transformer_rules(published, f"{ours}.transformer"),
            ]
        return rules


def _branches(shapes: Shapes) -> tuple[str, ...]:
    return BRANCHES[0] if "quant_conv_sem.weight" in shapes else BRANCHES[1]


def _transformer_rules(published: str, ours: str) -> list[Rule]:
    """A transformer with learned positions, in CLIP's names for its blocks."""
    return [
        Rename(f"{published}.positional_embedding", f"{ours}.positions"),
        Rename(f"{published}.ln_pre.*", f"{ours}.norm_in.*"),
        Rename(f"{published}.ln_post.*", f"{ours}.norm_out.*"),
        *clip_block_rules(published, ours),
    ]
