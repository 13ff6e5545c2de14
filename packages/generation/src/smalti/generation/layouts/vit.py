"""Blocks of transformers that are named as timm's ViT names them, which 1d-tokenizer does."""

from __future__ import annotations

from smalti.core.checkpoints.rules import Rename, Rule

LAYERS = {
    "norm1": "attention_norm",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.out",
    "norm2": "ffn_norm",
    "mlp.fc1": "ffn.up",
    "mlp.fc2": "ffn.down",
}


def block_rules(published: str, ours: str) -> list[Rule]:
    """Of the blocks below these two names."""
    return [Rename(f"{published}.{name}.*", f"{ours}.{own}.*") for name, own in LAYERS.items()]
