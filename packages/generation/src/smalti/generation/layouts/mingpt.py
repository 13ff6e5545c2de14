"""minGPT as taming-transformers has it: the second stage of the 1-D tokenizers with pretrained starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from smalti.core.checkpoints.layout import Shapes, count
from smalti.core.checkpoints.rules import Fused, Rename, Rule
from smalti.generation.layouts.llama import PREFIX, LightningTransformer, below, usual_heads


class MinGPT(LightningTransformer):
    """The transformer of taming's `Net2NetTransformer`, whose condition is a code in front of the sequence."""

    name = "sejal-gpt"

    def recognises(self, shapes: Shapes) -> bool:
        """The names of minGPT."""
        return {"pos_emb", "tok_emb.weight", "blocks.0.attn.key.weight", "blocks.0.mlp.0.weight", "ln_f.weight"} <= (
            below(shapes, PREFIX).keys()
        )

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """Sizes; heads are taken as 64 wide, and every code may stand in front."""
        codes, dim = shapes["tok_emb.weight"]
        return {
            "kind": "generator",
            "options": {
                "name": "ar",
                "layers": count(shapes, "blocks.{}."),
                "dim": dim,
                "heads": usual_heads(dim),
                "label_dropout": 0.0,
                "blocks": "gpt",
                "shared_classes": True,
            },
            "layout": {"kind": "sequence", "shape": [[shapes["pos_emb"][1]]], "vocab": [codes]},
            "classes": codes,
        }

    def rules(self, config: Mapping[str, Any]) -> Sequence[Rule]:
        """Of tables, blocks and output; queries, keys and values are one layer here."""
        del config
        block, ours = "blocks.{layer}", "transformer.blocks.{layer}"
        return [
            Rename("tok_emb.*", "embeddings.0.*"),
            Rename("pos_emb", "positions", squeeze=1),
            Fused([f"{block}.attn.{part}.*" for part in ("query", "key", "value")], f"{ours}.attention.qkv.*"),
            Rename(f"{block}.attn.proj.*", f"{ours}.attention.out.*"),
            Rename(f"{block}.ln1.*", f"{ours}.attention_norm.*"),
            Rename(f"{block}.ln2.*", f"{ours}.ffn_norm.*"),
            Rename(f"{block}.mlp.0.*", f"{ours}.ffn.up.*"),
            Rename(f"{block}.mlp.2.*", f"{ours}.ffn.down.*"),
            Rename("ln_f.*", "norm.*"),
            Rename("head.*", "outputs.0.*"),
        ]
