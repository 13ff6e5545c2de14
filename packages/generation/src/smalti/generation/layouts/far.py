"""FAR: the factorized transformers of FQGAN."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from smalti.core.checkpoints.layout import CheckpointLayout, Shapes, count
from smalti.core.checkpoints.rules import Rename, Rule
from smalti.generation.layouts.llama import RUN_TIME, block_rules, grid, llama_options


class FARLayout(CheckpointLayout):
    """FAR with two streams or more; tables and outputs count from 1 in the file, from 0 here."""

    name = "far"
    container = "model"
    ignored = RUN_TIME

    def recognises(self, shapes: Shapes) -> bool:
        """A table for each stream, and the inner head."""
        return {
            "tok_embeddings_1.weight",
            "output_1.weight",
            "aggregation_layer.weight",
            "ar_head.0.ffn_norm.weight",
        } <= (shapes.keys())

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """Sizes, for a grid of 16 x 16."""
        vocab: list[int] = []
        while (table := f"tok_embeddings_{len(vocab) + 1}.weight") in shapes:
            vocab.append(shapes[table][0])
        return {
            "kind": "generator",
            "options": {
                "name": "far",
                "layers": count(shapes, "layers.{}."),
                "inner_layers": count(shapes, "ar_head.{}."),
                **llama_options(shapes, "layers.0"),
            },
            "layout": grid(vocab),
            "classes": shapes["cls_embedding.embedding_table.weight"][0] - 1,
        }

    def rules(self, config: Mapping[str, Any]) -> Sequence[Rule]:
        """Of tables, both transformers and outputs."""
        streams = range(len(config["layout"]["vocab"]))
        return [
            Rename("cls_embedding.embedding_table.*", "condition.table.*"),
            *[Rename(f"tok_embeddings_{stream + 1}.*", f"embeddings.{stream}.*") for stream in streams],
            Rename("aggregation_layer.*", "aggregation.*"),
            *block_rules("layers.{layer}", "transformer.blocks.{layer}"),
            *block_rules("ar_head.{layer}", "inner.blocks.{layer}"),
            Rename("norm.*", "norm.*"),
            *[Rename(f"output_{stream + 1}.*", f"outputs.{stream}.*") for stream in streams],
        ]
