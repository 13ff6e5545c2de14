"""TiTok's MaskGIT generators, both forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from smalti.core.checkpoints.layout import CheckpointLayout, Shapes, count
from smalti.core.checkpoints.rules import Fused, Rename, Rule
from smalti.generation.layouts.tables import JointTable, SummedTables
from smalti.generation.layouts.vit import block_rules

HEADS = 16
"""Of the published models, whatever their width."""

STEPS = {"vit": 8, "uvit": 64}
"""Of sampling, as published."""

FIRST = {"vit": "model.encoder.layer.0.intermediate.dense", "uvit": "mid_block.mlp.fc1"}
"""The feed-forward's first layer in some block of each form."""


class TiTokMaskGIT(CheckpointLayout):
    """The generators of TiTok: `vit` is BERT as transformers names it, `uvit` has skips; heads are taken as 16."""

    name = "titok-maskgit"
    ignored = ("model.embeddings.position_ids",)

    def recognises(self, shapes: Shapes) -> bool:
        """The names of either form."""
        vit = {"model.embeddings.word_embeddings.weight", "model.lm_head.weight"}
        uvit = {"in_blocks.0.attn.qkv.weight", "out_blocks.0.skip_linear.weight", "lm_head.weight", "pos_embed"}
        return vit <= shapes.keys() or uvit <= shapes.keys()

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """Sizes, for a sequence."""
        form = "vit" if "model.lm_head.weight" in shapes else "uvit"
        width, dim = shapes[f"{FIRST[form]}.weight"]
        if form == "vit":
            vocab, table = shapes["model.lm_head.weight"][0], shapes["model.embeddings.word_embeddings.weight"]
            length = shapes["model.embeddings.position_embeddings.weight"][0] - 1
            own: dict[str, Any] = {"layers": count(shapes, "model.encoder.layer.{}.")}
        else:
            vocab, table, length = shapes["lm_head.weight"][0], shapes["embeddings.weight"], shapes["pos_embed"][1] - 1
            own = {"layers": 2 * count(shapes, "in_blocks.{}."), "norm_eps": 1e-5, "dropout": 0, "attention_dropout": 0}
        return {
            "kind": "generator",
            "options": {
                "name": "maskgit",
                "form": form,
                "dim": dim,
                "heads": HEADS,
                "ffn_dim": width,
                "steps": STEPS[form],
                **own,
            },
            "layout": {"kind": "sequence", "shape": [[length]], "vocab": [vocab]},
            "classes": table[0] - vocab - 2,
        }

    def overrides(self, published: Mapping[str, Any]) -> list[str]:
        """The number of heads."""
        generator = published.get("model", {}).get("generator", {})
        return [f"heads={generator['num_attention_heads']}"] if "num_attention_heads" in generator else []

    def rules(self, config: Mapping[str, Any]) -> Sequence[Rule]:
        """Of tables, blocks and output."""
        (vocab,) = config["layout"]["vocab"]
        ours = ("embeddings.0.weight", "condition.table.weight", vocab)
        return _bert(*ours) if config["options"]["form"] == "vit" else _uvit(*ours)


def _bert(codes: str, classes: str, vocab: int) -> list[Rule]:
    table, block, ours = "model.embeddings", "model.encoder.layer.{layer}", "transformer.blocks.{layer}"
    return [
        JointTable(f"{table}.word_embeddings.weight", codes, classes, vocab, masked=True),
        SummedTables(f"{table}.position_embeddings.weight", f"{table}.token_type_embeddings.weight", "positions"),
        Rename(f"{table}.LayerNorm.*", "norm.*"),
        Fused([f"{block}.attention.self.{part}.*" for part in ("query", "key", "value")], f"{ours}.attention.qkv.*"),
        Rename(f"{block}.attention.output.dense.*", f"{ours}.attention.out.*"),
        Rename(f"{block}.attention.output.LayerNorm.*", f"{ours}.attention_norm.*"),
        Rename(f"{block}.intermediate.dense.*", f"{ours}.ffn.up.*"),
        Rename(f"{block}.output.dense.*", f"{ours}.ffn.down.*"),
        Rename(f"{block}.output.LayerNorm.*", f"{ours}.ffn_norm.*"),
        Rename("model.lm_head.*", "outputs.0.*"),
    ]


def _uvit(codes: str, classes: str, vocab: int) -> list[Rule]:
    return [
        JointTable("embeddings.weight", codes, classes, vocab, masked=True),
        Rename("pos_embed", "positions", squeeze=1),
        Rename("out_blocks.{layer}.skip_linear.*", "transformer.skips.{layer}.*"),
        *block_rules("in_blocks.{layer}", "transformer.downward.{layer}"),
        *block_rules("mid_block", "transformer.middle"),
        *block_rules("out_blocks.{layer}", "transformer.upward.{layer}"),
        Rename("norm.*", "norm.*"),
        Rename("lm_head.*", "outputs.0.*"),
    ]
