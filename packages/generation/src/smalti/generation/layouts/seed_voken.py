"""The transformers of SEED-Voken: Open-MAGVIT2's over two sub-tokens, and IBQ's with AdaLN.

Their files are Lightning checkpoints, with the tokenizer beside the transformer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from smalti.core.checkpoints.layout import Shapes, count
from smalti.core.checkpoints.rules import Rename, Rule
from smalti.generation.layouts.llama import PREFIX, LightningTransformer, below, block_rules, grid, llama_options


class OpenMAGVIT2GPT(LightningTransformer):
    """Open-MAGVIT2's transformers: FAR's two levels with summed embeddings, and the sum of the streams' losses."""

    name = "open-magvit2-gpt"

    def recognises(self, shapes: Shapes) -> bool:
        """The two sub-tokens' tables."""
        return {"pre_emb.weight", "post_emb.weight", "spatial_blocks.0.ffn_norm.weight"} <= below(shapes, PREFIX).keys()

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """Sizes, for a grid of 16 x 16."""
        return {
            "kind": "generator",
            "options": {
                "name": "far",
                "layers": count(shapes, "spatial_blocks.{}."),
                "inner_layers": count(shapes, "factorized_blocks.{}."),
                **llama_options(shapes, "spatial_blocks.0"),
                "aggregation": "sum",
                "objective": "sum",
            },
            "layout": grid([shapes["pre_emb.weight"][0], shapes["post_emb.weight"][0]]),
            "classes": shapes["class_emb.embedding_table.weight"][0] - 1,
        }

    def rules(self, config: Mapping[str, Any]) -> Sequence[Rule]:
        """Of tables, both transformers and outputs."""
        del config
        return [
            Rename("class_emb.embedding_table.*", "condition.table.*"),
            Rename("pre_emb.*", "embeddings.0.*"),
            Rename("post_emb.*", "embeddings.1.*"),
            *block_rules("spatial_blocks.{layer}", "transformer.blocks.{layer}"),
            *block_rules("factorized_blocks.{layer}", "inner.blocks.{layer}"),
            Rename("norm.*", "norm.*"),
            Rename("head.*", "outputs.*"),
        ]


class IBQLlama(LightningTransformer):
    """IBQ's transformers: LlamaGen's blocks, modulated by the class."""

    name = "ibq-llama"

    def recognises(self, shapes: Shapes) -> bool:
        """LlamaGen's blocks with AdaLN."""
        return {"tok_emb.weight", "blocks.0.attention.wqkv.weight", "head_nm.rmsnorm.weight"} <= (
            below(shapes, PREFIX).keys()
        )

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """Sizes, for a grid of 16 x 16."""
        return {
            "kind": "generator",
            "options": {
                "name": "ar",
                "layers": count(shapes, "blocks.{}."),
                **llama_options(shapes, "blocks.0"),
                "modulation": True,
            },
            "layout": grid([shapes["tok_emb.weight"][0]]),
            "classes": shapes["class_emb.embedding_table.weight"][0] - 1,
        }

    def rules(self, config: Mapping[str, Any]) -> Sequence[Rule]:
        """Of tables, blocks and output."""
        del config
        return [
            Rename("class_emb.embedding_table.*", "condition.table.*"),
            Rename("tok_emb.*", "embeddings.0.*"),
            *block_rules("blocks.{layer}", "transformer.blocks.{layer}"),
            Rename("head_nm.rmsnorm.*", "norm.norm.*"),
            Rename("head_nm.ada_lin.1.*", "norm.modulation.linear.*"),
            Rename("head.*", "outputs.0.*"),
        ]
