"""LlamaGen's transformers, from classes and from captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from smalti.core.checkpoints.layout import CheckpointLayout, Shapes, count
from smalti.core.checkpoints.rules import Rename, Rule
from smalti.generation.layouts.llama import RUN_TIME, block_rules, grid, llama_options

TEXT_ENCODER = "google/flan-t5-xl"
"""Of the published text-conditional models; their files do not tell."""


class LlamaGenGPT(CheckpointLayout):
    """LlamaGen's class-conditional transformers; no file tells the grid: `layout.shape=[[24, 24]]` for 384 pixels."""

    name = "llamagen-gpt"
    container = "model"
    ignored = RUN_TIME
    signature: ClassVar[tuple[str, ...]] = ("cls_embedding.embedding_table.weight",)

    def recognises(self, shapes: Shapes) -> bool:
        """Its own names of tables beside LlamaGen's blocks."""
        return {*self.signature, "tok_embeddings.weight", "output.weight", "layers.0.attention.wqkv.weight"} <= (
            shapes.keys()
        )

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """Sizes, for a grid of 16 x 16."""
        return {
            "kind": "generator",
            "options": {
                "name": "ar",
                "layers": count(shapes, "layers.{}."),
                **llama_options(shapes, "layers.0"),
                **self.condition(shapes),
            },
            "layout": grid([shapes["tok_embeddings.weight"][0]]),
            "classes": self.classes(shapes),
        }

    def condition(self, shapes: Shapes) -> dict[str, Any]:
        """Options of what stands before the tokens."""
        del shapes
        return {}

    def classes(self, shapes: Shapes) -> int:
        """The last row of the table is the null class."""
        return shapes["cls_embedding.embedding_table.weight"][0] - 1

    def rules(self, config: Mapping[str, Any]) -> Sequence[Rule]:
        """Of tables, blocks and output."""
        del config
        return [
            Rename("cls_embedding.embedding_table.*", "condition.table.*"),
            Rename("cls_embedding.uncond_embedding", "condition.null"),
            Rename("cls_embedding.cap_proj.fc1.*", "condition.inner.*"),
            Rename("cls_embedding.cap_proj.fc2.*", "condition.outer.*"),
            Rename("tok_embeddings.*", "embeddings.0.*"),
            *block_rules("layers.{layer}", "transformer.blocks.{layer}"),
            Rename("norm.*", "norm.*"),
            Rename("output.*", "outputs.0.*"),
        ]


class LlamaGenTextGPT(LlamaGenGPT):
    """LlamaGen's text-conditional transformers; the grid is `layout.shape=[[32, 32]]` for 512 pixels."""

    name = "llamagen-gpt-t2i"
    signature = ("cls_embedding.uncond_embedding", "cls_embedding.cap_proj.fc1.weight")

    def condition(self, shapes: Shapes) -> dict[str, Any]:
        """The null caption has the length and the width of all."""
        length, width = shapes["cls_embedding.uncond_embedding"]
        return {"captions": {"length": length, "width": width, "encoder": TEXT_ENCODER}}

    def classes(self, shapes: Shapes) -> int:
        """There are no classes."""
        del shapes
        return 1
