"""Transformer blocks in the names of OpenAI's CLIP, which several systems took over."""

from __future__ import annotations

from smalti.core.checkpoints.rules import Rename, Rule

BLOCK = {
    "ln_1.*": "norm1.*",
    "attn.in_proj_weight": "attention.qkv.weight",
    "attn.in_proj_bias": "attention.qkv.bias",
    "attn.out_proj.*": "attention.out.*",
    "ln_2.*": "norm2.*",
    "mlp.c_fc.*": "mlp.0.*",
    "mlp.c_proj.*": "mlp.2.*",
}


def clip_block_rules(published: str, ours: str) -> list[Rule]:
    """The blocks `{published}.transformer.0` and so on are `{ours}.blocks.0` and so on."""
    return [
        Rename(f"{published}.transformer.{{block}}.{theirs}", f"{ours}.blocks.{{block}}.{here}")
        for theirs, here in BLOCK.items()
    ]
