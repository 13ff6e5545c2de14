"""RAR, as 1d-tokenizer publishes it, and RobustTok with more codes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from smalti.core.checkpoints.layout import CheckpointLayout, Shapes, count
from smalti.core.checkpoints.rules import Rename, Rule
from smalti.generation.layouts.tables import JointTable, Reordered, Rows
from smalti.generation.layouts.vit import block_rules

SPARE = {"positions": 1024, "times": 100}
"""Rows of the published tables beyond the number of tokens."""

MODULATION = (2, 5, 1, 4, 0, 3)
"""Where our parts (gates, scales, shifts) lie: shift, scale and gate of attention, then of the feed-forward."""


class RARLayout(CheckpointLayout):
    """RAR's transformers; a square number of tokens is taken as a grid."""

    name = "rar"

    def recognises(self, shapes: Shapes) -> bool:
        """Its target-aware positions."""
        return {"target_aware_pos_embed", "timesteps_embeddings", "blocks.0.adaLN_modulation.1.weight"} <= shapes.keys()

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """All sizes follow from the shapes."""
        width, dim = shapes["blocks.0.mlp.fc1.weight"]
        vocab = shapes["lm_head.weight"][0]
        length = shapes["pos_embed"][1] - SPARE["positions"]
        side = math.isqrt(length)
        square = side**2 == length
        return {
            "kind": "generator",
            "options": {
                "name": "rar",
                "layers": count(shapes, "blocks.{}."),
                "dim": dim,
                "heads": dim // shapes["blocks.0.attn.q_norm.weight"][0],
                "ffn_dim": width,
            },
            "layout": {
                "kind": "grid" if square else "sequence",
                "shape": [[side, side] if square else [length]],
                "vocab": [vocab],
            },
            "classes": shapes["embeddings.weight"][0] - vocab - 2,
        }

    def rules(self, config: Mapping[str, Any]) -> Sequence[Rule]:
        """Of tables, blocks and output."""
        (vocab,) = config["layout"]["vocab"]
        length = math.prod(config["layout"]["shape"][0])
        positions, times = length + SPARE["positions"], length + SPARE["times"]
        block, ours = "blocks.{layer}", "transformer.blocks.{layer}"
        return [
            JointTable("embeddings.weight", "embeddings.0.weight", "condition.table.weight", vocab, masked=False),
            Rename("cls_token", "start", squeeze=2),
            Rows("pos_embed", "positions", 0, length + 2, positions),
            Rows("target_aware_pos_embed", "targets", 2, length, positions),
            Rows("timesteps_embeddings", "times", 0, length + 1, times),
            *block_rules(block, ours),
            Rename(f"{block}.attn.q_norm.*", f"{ours}.attention.query_norm.*"),
            Rename(f"{block}.attn.k_norm.*", f"{ours}.attention.key_norm.*"),
            Reordered(Rename(f"{block}.adaLN_modulation.1.*", f"{ours}.modulation.linear.*"), MODULATION),
            Rename("adaln_before_head.adaLN_modulation.1.*", "norm.modulation.linear.*"),
            Rename("lm_head.*", "outputs.0.*"),
        ]
