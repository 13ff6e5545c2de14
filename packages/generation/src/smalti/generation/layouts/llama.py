"""What published layouts with LlamaGen's blocks have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from smalti.core.checkpoints.layout import CheckpointLayout, Shapes
from smalti.core.checkpoints.rules import Fused, Rename, Rule
from smalti.core.errors import UserError

SIDE = 16
"""Of the token grid, which no weight tells, at 256 pixels."""

HEADS = {3200: 32, 4096: 32}
"""By width, where a head is not 64 wide."""

RUN_TIME = ("freqs_cis", "*.kv_cache.*", "*.attn.mask")
"""Entries of files that hold what was computed, not learned."""
PREFIX = "transformer."
"""Before the names of a transformer in checkpoints of Lightning."""


class LightningTransformer(CheckpointLayout):
    """A transformer in a checkpoint of Lightning, where the tokenizer may lie beside it."""

    container = "state_dict"
    ignored = RUN_TIME

    def select(self, tensors: Mapping[str, Tensor], *, ema: bool) -> Mapping[str, Tensor]:
        """Of the transformer alone."""
        del ema
        return below(tensors, PREFIX)


def block_rules(published: str, ours: str) -> list[Rule]:
    """Of LlamaGen's blocks; both names end with the placeholder of the layer."""
    return [
        Rename(f"{published}.attention.wqkv.*", f"{ours}.attention.qkv.*"),
        Rename(f"{published}.attention.wo.*", f"{ours}.attention.out.*"),
        Fused([f"{published}.feed_forward.w1.weight", f"{published}.feed_forward.w3.weight"], f"{ours}.ffn.up.weight"),
        Rename(f"{published}.feed_forward.w2.*", f"{ours}.ffn.down.*"),
        Rename(f"{published}.attention_norm.*", f"{ours}.attention_norm.*"),
        Rename(f"{published}.ffn_norm.*", f"{ours}.ffn_norm.*"),
        Rename(f"{published}.ada_lin.1.*", f"{ours}.modulation.linear.*"),
    ]


def llama_options(shapes: Shapes, block: str) -> dict[str, Any]:
    """The widths; `block` is the name of the first block."""
    width, dim = shapes[f"{block}.feed_forward.w1.weight"]
    return {"dim": dim, "heads": usual_heads(dim), "ffn_multiple": _ffn_multiple(dim, width)}


def usual_heads(dim: int) -> int:
    """Of a published model of that width; the weights do not tell."""
    return HEADS.get(dim, max(1, dim // 64))


def _ffn_multiple(dim: int, width: int) -> int:
    """To what 8/3 dim is rounded up to make this width."""
    for multiple in (256, width):
        if -(-(8 * dim // 3) // multiple) * multiple == width:
            return multiple
    raise UserError(f"a feed-forward {width} wide does not follow from 8/3 of the width {dim} rounded up")


def grid(vocab: list[int], side: int = SIDE) -> dict[str, Any]:
    """The layout of tokens, as plain data."""
    return {"kind": "grid", "shape": [[side, side]], "vocab": vocab}


def below(entries: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries below a prefix, without it; all of them where none has it."""
    found = {name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)}
    return found or dict(entries)
