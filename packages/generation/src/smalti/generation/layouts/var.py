"""VAR's transformers, and ImageFolder's over product branches.

A training checkpoint holds the tokenizer as well; the transformer alone is read, and the tokenizer comes in by a layout
of its own. Neither tells the scales, which follow from their number and that of the tokens for the published models:
for others they are `layout.shape=[[1, 1], [2, 2], ...]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smalti.core.checkpoints.layout import CheckpointLayout, Shapes, count
from smalti.core.checkpoints.rules import Rename, Rule
from smalti.generation.layouts.llama import usual_heads

SIDES = (
    (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
    (1, 1, 2, 3, 3, 4, 5, 6, 8, 11),
)
"""VAR's at 256, 512 and 1024 pixels, and ImageFolder's."""

MASK = "attn_bias_for_masking"
ZEROS = ".attn.zero_k_bias"
MODEL = "var_wo_ddp."
TOKENIZER = "vae_local."


class VARLayout(CheckpointLayout):
    """VAR's transformers over one stream of codes."""

    name = "var"
    ignored = ("empty_emb", f"{TOKENIZER}*")  # of training with masks, and of the tokenizer

    def recognises(self, shapes: Shapes) -> bool:
        """Its names, and no product branches beside them."""
        return _is_var(shapes) and not _branches(shapes)

    def select(self, tensors: Mapping[str, Tensor], *, ema: bool) -> Mapping[str, Tensor]:
        """Of the transformer, and the tokenizer's below a name of its own."""
        del ema
        return _parts(tensors)

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """Sizes."""
        selected = _parts(shapes)
        dim, code_width = selected["word_embed.weight"]
        heads = selected.get("blocks.0.attn.scale_mul_1H11")
        scales, positions = selected["lvl_embed.weight"][0], selected["pos_1LC"][1]
        return {
            "kind": "generator",
            "options": {
                "name": "var",
                "layers": count(selected, "blocks.{}."),
                "dim": dim,
                "heads": usual_heads(dim) if heads is None else heads[1],
                "ffn_ratio": selected["blocks.0.ffn.fc1.weight"][0] / dim,
                "cosine_attention": heads is not None,
                "shared_modulation": "shared_ada_lin.1.weight" in selected,
                "code_width": code_width,
            },
            "layout": {"kind": "scales", "shape": _grids(scales, positions), "vocab": self.vocab(selected)},
            "classes": selected["class_emb.weight"][0] - 1,
        }

    def vocab(self, shapes: Shapes) -> list[int]:
        """All logits are those of one stream."""
        return [shapes["head.weight"][0]]

    def rules(self, config: Mapping[str, Any]) -> Sequence[Rule]:
        """Of embeddings, blocks and output."""
        options = config["options"]
        areas = [height * width for height, width in config["layout"]["shape"]]
        block, ours = "blocks.{layer}", "transformer.blocks.{layer}"
        return [
            Rename("pos_start", "inputs.start", squeeze=1),
            Rename("pos_1LC", "inputs.positions", squeeze=1),
            Rename("lvl_embed.*", "inputs.scales.*"),
            Rename("word_embed.*", "inputs.words.*"),
            Rename("class_emb.*", "condition.table.*"),
            Rename("shared_ada_lin.1.*", "transformer.modulation.linear.*"),
            Rename(f"{block}.ada_lin.1.*", f"{ours}.modulation.linear.*"),
            Rename(f"{block}.ada_gss", f"{ours}.modulation_table", squeeze=2),
            Rename(f"{block}.attn.mat_qkv.*", f"{ours}.attention.qkv.*"),
            Rename(f"{block}.attn.q_bias", f"{ours}.attention.query_bias"),
            Rename(f"{block}.attn.v_bias", f"{ours}.attention.value_bias"),
            PerHead(f"{block}.attn.scale_mul_1H11", f"{ours}.attention.log_scale"),
            Rename(f"{block}.attn.proj.*", f"{ours}.attention.out.*"),
            Rename(f"{block}.ffn.fc1.*", f"{ours}.ffn.up.*"),
            Rename(f"{block}.ffn.fc2.*", f"{ours}.ffn.down.*"),
            Rename("head_nm.ada_lin.1.*", "norm.modulation.linear.*"),
            Rename("head.*", "output.*"),
            Computed(tuple(areas), options["layers"], options["dim"]),
        ]


class ImageFolderLayout(VARLayout):
    """ImageFolder's transformer: the branches' logits side by side, two of them where no tokenizer lies beside it."""

    name = "imagefolder-var"

    def recognises(self, shapes: Shapes) -> bool:
        """The names of VAR, beside the codebooks of product branches."""
        return _is_var(shapes) and bool(_branches(shapes))

    def vocab(self, shapes: Shapes) -> list[int]:
        """A share of the logits for each branch."""
        branches = _branches(shapes) or 2
        return [shapes["head.weight"][0] // branches] * branches


class PerHead(Rename):
    """One number per head, `(1, H, 1, 1)` in the file and `(H,)` here."""

    def _ours(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(-1)

    def _published(self, tensor: Tensor, name: str) -> Tensor:
        del name
        return tensor.reshape(1, -1, 1, 1)


@dataclass(frozen=True)
class Computed(Rule):
    """Buffers that follow from the scales, which strict readers want; and no place for the tokenizer's quantizer."""

    areas: tuple[int, ...]
    layers: int
    dim: int

    def to_ours(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """They are not kept, so that a mask padded to a multiple of 8 is as good."""
        for name in [name for name in tensors if name in ("lvl_1L", MASK) or name.endswith(ZEROS)]:
            del tensors[name]
        return {}

    def to_published(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The scale of every position, the mask between positions, the biases of keys."""
        for name in [name for name in tensors if name.startswith("inputs.quantizer.")]:
            del tensors[name]
        scales = torch.repeat_interleave(torch.arange(len(self.areas)), torch.tensor(self.areas))
        hidden = scales[:, None] < scales
        return {
            "lvl_1L": scales[None],
            MASK: torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)[None, None],
            **{f"blocks.{layer}{ZEROS}": torch.zeros(self.dim) for layer in range(self.layers)},
        }


def _parts(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of a training checkpoint by names that begin at its two models; others as they are."""
    if not any(MODEL in name for name in entries):
        return dict(entries)
    found = {}
    for name, entry in entries.items():
        if MODEL in name:
            found[name.partition(MODEL)[2]] = entry
        elif TOKENIZER in name:
            found[TOKENIZER + name.partition(TOKENIZER)[2]] = entry
    return found


def _is_var(shapes: Shapes) -> bool:
    return {"pos_1LC", "lvl_embed.weight", "word_embed.weight", "blocks.0.attn.mat_qkv.weight"} <= _parts(shapes).keys()


def _branches(shapes: Shapes) -> int:
    """How many product branches the tokenizer beside the transformer has; 0 without one."""
    return count(_parts(shapes), f"{TOKENIZER}quantizes.{{}}.")


def _grids(scales: int, positions: int) -> list[list[int]]:
    """Those of the published model with that many scales and tokens; else of any, which will not fit."""
    for sides in SIDES:
        if (len(sides), sum(side**2 for side in sides)) == (scales, positions):
            return [[side, side] for side in sides]
    return [[side, side] for side in SIDES[0]]
