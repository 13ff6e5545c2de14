"""What the published layouts of the VQGAN family share: rules for its blocks, and options read off names and shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from smalti.core.checkpoints.layout import CheckpointLayout, Shapes, count
from smalti.core.checkpoints.rules import Fused, Rename, Rule

TRAINING = ("loss.*", "model_ema.*")
"""Losses with their networks, and averaged weights, in files of Lightning."""

LEGACY_WEIGHTS = {"commitment_weight": 1.0, "codebook_weight": 0.25}
"""Of the losses of codes as taming-transformers began with them ("legacy"): the smaller weight is that of the codes."""

_RESIDUAL_LAYERS = ("norm1", "conv1", "norm2", "conv2")


@dataclass(frozen=True)
class Statistics(Rule):
    """A statistic of training that is not kept here; written as zeros, for readers that insist on it.

    Args:
        name: the published name.
        shape: its shape.
    """

    name: str
    shape: tuple[int, ...]

    def to_ours(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Nothing."""
        tensors.pop(self.name, None)
        return {}

    def to_published(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Zeros."""
        return {self.name: torch.zeros(self.shape)}


class AveragedLayout(CheckpointLayout):
    """A layout of files of Lightning, which may hold averages beside the weights themselves (SEED-Voken)."""

    ignored = TRAINING

    def select(self, tensors: Mapping[str, Tensor], *, ema: bool) -> Mapping[str, Tensor]:
        """Averaged weights where there are any."""
        return averaged_weights(tensors) if ema else tensors


def residual_rules(published: str, ours: str, reverse: Mapping[str, int] | None = None) -> list[Rule]:
    """A residual block under the names `norm1`, `conv1`, `norm2`, `conv2`, `nin_shortcut`."""
    reverse = reverse or {}
    return [
        Rename(f"{published}.nin_shortcut.*", f"{ours}.shortcut.*", reverse),
        *(Rename(f"{published}.{layer}.*", f"{ours}.{layer}.*", reverse) for layer in _RESIDUAL_LAYERS),
    ]


def attention_rules(
    published: str, ours: str, reverse: Mapping[str, int] | None = None, *, fused: bool = False, out: str = "proj_out"
) -> list[Rule]:
    """Attention under the names `norm`, `q`, `k`, `v` (or, `fused`, `qkv`) and `out`."""
    reverse = reverse or {}
    projections: Rule = Rename(f"{published}.qkv.*", f"{ours}.qkv.*", reverse)
    if not fused:
        projections = Fused([f"{published}.{name}.*" for name in "qkv"], f"{ours}.qkv.*", reverse)
    return [
        projections,
        Rename(f"{published}.{out}.*", f"{ours}.out.*", reverse),
        Rename(f"{published}.norm.*", f"{ours}.norm.*", reverse),
    ]


def encoder_ends_rules(published: str = "encoder") -> list[Rule]:
    """The encoder's first convolution and its head."""
    return [
        Rename(f"{published}.conv_in.*", "encoder.trunk.conv_in.*"),
        Rename(f"{published}.norm_out.*", "encoder.head.norm.*"),
        Rename(f"{published}.conv_out.*", "encoder.head.conv.*"),
    ]


def decoder_ends_rules(published: str = "decoder", ours: str = "decoder") -> list[Rule]:
    """The decoder's first convolution and its head."""
    return [
        Rename(f"{published}.conv_in.*", f"{ours}.conv_in.*"),
        Rename(f"{published}.norm_out.*", f"{ours}.head.norm.*"),
        Rename(f"{published}.conv_out.*", f"{ours}.head.conv.*"),
    ]


def projection_rules(options: Mapping[str, Any], to_codes: str, from_codes: str) -> list[Rule]:
    """The convolutions between encoder, quantizer and decoder; 1 x 1 ones are linear layers here."""
    return [
        Rename(f"{to_codes}.*", "to_codes.*", pointwise=options["to_codes"] == "linear"),
        Rename(f"{from_codes}.*", "from_codes.*", pointwise=options["from_codes"] == "linear"),
    ]


def phi_convolutions(shapes: Shapes, published: str) -> int:
    """How many phi convolutions a quantizer has: some that scales share, one for all, one for each, or none."""
    phi = f"{published}.quant_resi"
    single = int(f"{phi}.qresi.weight" in shapes)
    return count(shapes, f"{phi}.qresi_ls.{{}}.") or single or count(shapes, f"{phi}.{{}}.")


def phi_rules(convolutions: int, scales: int, published: str, ours: str) -> list[Rule]:
    """One convolution for all scales, one for each, or a list that they share; the first that fits is written."""
    phi = f"{published}.quant_resi"
    single = [Rename(f"{phi}.qresi.*", f"{ours}.phi.0.convolution.*")] if convolutions == 1 else []
    each = [Rename(f"{phi}.{index}.*", f"{ours}.phi.{index}.convolution.*") for index in range(scales)]
    return [
        *single,
        *(each if convolutions == scales else []),
        Rename(f"{phi}.qresi_ls.{{phi}}.*", f"{ours}.phi.{{phi}}.convolution.*"),
    ]


def preprocessing(shapes: Shapes, image_size: int) -> dict[str, Any]:
    """Images of `image_size`, with the channels that the encoder's first convolution takes."""
    return {"image_size": image_size, "channels": shapes["encoder.conv_in.weight"][1]}


def projection(shapes: Shapes, name: str) -> str:
    """Which projection of a composed tokenizer the convolution `name` is."""
    return "linear" if shapes[f"{name}.weight"][-1] == 1 else "convolution"


def levels_config(shapes: Shapes, first: str | None, levels: Sequence[str], attention: str | None) -> dict[str, Any]:
    """Widths, blocks and attention of an encoder or decoder.

    Args:
        shapes: of the published state dict.
        first: the convolution whose outputs are the width at multiplier 1; None for a decoder, which has none.
        levels: from fine to coarse, where the residual blocks of each level lie: `encoder.down.0.block.{}`.
        attention: what stands instead of `block` in these where a level has attention; None where no model has it.
    """
    widths = [shapes[f"{level.format(0)}.conv1.weight"][0] for level in levels]
    width = shapes[f"{first}.weight"][0] if first else math.gcd(*widths)
    attends: list[int] = []
    if attention is not None:
        places = [_sibling(level, attention) for level in levels]
        attends = [index for index, place in enumerate(places) if count(shapes, f"{place}.")]
    return {
        "width": width,
        "multipliers": [level // width for level in widths],
        "blocks": count(shapes, f"{levels[0]}."),
        "attention_levels": attends,
        "middle_attention": attention is not None,
    }


def _sibling(level: str, name: str) -> str:
    parts = level.split(".")
    return ".".join([*parts[:-2], name, parts[-1]])


def has_averaged_weights(shapes: Shapes) -> bool:
    """Whether a state dict holds averages beside the weights themselves, as those of SEED-Voken do."""
    return any(name.startswith("model_ema.") for name in shapes)


def averaged_weights(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The averages under the names of the weights; `tensors` itself where it has none.

    The average of `encoder.conv_in.weight` is called `model_ema.encoderconv_inweight`. A weight without an average is
    left out, to be reported as missing.
    """
    if not any(name.startswith("model_ema.") for name in tensors):
        return tensors
    averages = {
        name: f"model_ema.{name.replace('.', '')}" for name in tensors if not name.startswith(("loss.", "model_ema."))
    }
    return {name: tensors[average] for name, average in averages.items() if average in tensors}
