"""GaussianToken's published checkpoints (Dong et al. 2025), and its plain VQGAN.

Legend: N Gaussians, E width, K codes, Z their width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor

from smalti.core.checkpoints.layout import CheckpointLayout, Shapes, count
from smalti.core.checkpoints.layouts.open_magvit2 import network_rules, networks_config
from smalti.core.checkpoints.layouts.vqgan_rules import TRAINING
from smalti.core.checkpoints.rules import Rename, Rule
from smalti.gaussian.gaussiantoken.geometry import GEOMETRY

EMBED = "gs_embed."
AVERAGES = "model_ema."
OPERATIONS = {"attention": "cross_attn", "feed-forward": "ffn", "refine": "refine", "sparse-convolution": "spconv"}
"""Operations by our names, and what they are called there."""

# An entry that only an operation of that name has.
_MARKS = {
    "attention": "layers.0.self_attn.in_proj_weight",
    "feed-forward": "layers.0.0.weight",
    "refine": "layers.11.scale",
    "sparse-convolution": "conv.weight",
}
# Buffers, and weights that a configuration may freeze, are not averaged.
_AS_THEY_ARE = (
    "quantize._codebook.*",
    "*.fixed_offsets",
    "*.current_range_max",
    "*.grid_size",
    f"{EMBED}gaussian_lifter.*",
)


@dataclass(frozen=True)
class Unused(Rule):
    """Published entries that nothing is computed with.

    Args:
        prefix: of their names.
    """

    prefix: str

    def to_ours(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Nothing."""
        for name in [name for name in tensors if name.startswith(self.prefix)]:
            del tensors[name]
        return {}

    def to_published(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Nothing."""
        del tensors
        return {}


@dataclass(frozen=True)
class Fresh(Rule):
    """A statistic of ours that is not published; training begins it anew.

    Args:
        name: ours.
        value: at the beginning.
    """

    name: str
    value: Tensor

    def to_ours(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The value at the beginning."""
        del tensors
        return {self.name: self.value}

    def to_published(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Nothing."""
        tensors.pop(self.name, None)
        return {}


@dataclass(frozen=True)
class Kernel(Rule):
    """The kernel of a sparse convolution: spconv has outputs, x, y, inputs, torch outputs, inputs, y, x.

    Args:
        published: its name.
        ours: the same.
    """

    published: str
    ours: str

    def to_ours(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """With torch's axes."""
        return self._turned(Rename(self.published, self.ours).to_ours(tensors))

    def to_published(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """With spconv's axes."""
        return self._turned(Rename(self.published, self.ours).to_published(tensors))

    def _turned(self, moved: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.permute(0, 3, 2, 1) for name, tensor in moved.items()}


class GaussianTokenLayout(CheckpointLayout):
    """A GaussianToken, or the VQGAN that its authors compare it with, from files of Lightning.

    Published figures were measured with the averaged weights. Weights that are there and never used are left out:
    templates of operations, and what every refinement but the last one has for reading out.
    """

    name: ClassVar[str] = "gaussiantoken"
    ignored: ClassVar[tuple[str, ...]] = (*TRAINING, f"{EMBED}op_module_map.*")
    container: ClassVar[str | None] = "state_dict"

    def recognises(self, shapes: Shapes) -> bool:
        """Open-MAGVIT2's networks under names of their own, and lucidrains' codebook."""
        return {"img_decoder.adaptive.0.gamma.weight", "quantize._codebook.embed"} <= shapes.keys()

    def config(self, shapes: Shapes) -> dict[str, Any]:
        """Sizes and operations; images of 32 pixels for 64 Gaussians, of 256 for 256, as published."""
        _, size, dim = shapes["quantize._codebook.embed"]
        networks = networks_config(shapes, "img_")
        quantizer = {
            "name": "vq",
            "dim": dim,
            "codebook_size": size,
            "update": "ema",
            "ema_decay": 0.8,
            "estimator": "rotation",
            "initialise": "data",
            "revive_below": 2.0,
        }
        factor = 2 ** (len(networks["encoder"]["multipliers"]) - 1)
        options: dict[str, Any] = {"name": "composed", "to_codes": "none", "from_codes": "none"}
        side = 16
        if any(name.startswith(EMBED) for name in shapes):
            options = {"name": "gaussiantoken", "embed": embed_config(shapes, EMBED)}
            side = 2 * math.isqrt(options["embed"]["gaussians"])
        channels = shapes["img_encoder.conv_in.weight"][1]
        preprocessing = {"image_size": factor * side, "channels": channels, "fit": "native-crop"}
        return {
            "kind": "tokenizer",
            "options": {"preprocessing": preprocessing, **networks, "quantizer": quantizer, **options},
        }

    def rules(self, config: Mapping[str, Any]) -> Sequence[Rule]:
        """The networks, the codebook with its averages, and what makes the Gaussians."""
        options = config["options"]
        embed = embed_rules(options["embed"], EMBED, "embed.") if "embed" in options else []
        return [*network_rules(options, "img_"), *_codebook_rules(options["quantizer"]), *embed]

    def select(self, tensors: Mapping[str, Tensor], *, ema: bool) -> Mapping[str, Tensor]:
        """The averages in the place of weights, where there are any; a weight that lacks its own is left out."""
        if not ema or not any(name.startswith(AVERAGES) for name in tensors):
            return tensors
        operations = _operations({name: tuple(tensor.shape) for name, tensor in tensors.items()}, EMBED)
        selected = {}
        for name in tensors:
            if self.is_ignored(name):
                continue
            averages = _average(name), _average(_template(name, operations))
            average = next((entry for entry in averages if entry in tensors), None)
            if average is not None:
                selected[name] = tensors[average]
            elif any(fnmatchcase(name, pattern) for pattern in _AS_THEY_ARE):
                selected[name] = tensors[name]
        return selected


def embed_config(shapes: Shapes, prefix: str) -> dict[str, Any]:
    """Options of `GaussianEmbed` from the names and shapes under `prefix`; the others have their published values."""
    gaussians, width = shapes[f"{prefix}gaussian_lifter.instance_feature"]
    entries = shapes[f"{prefix}gaussian_lifter.anchor"][1]
    operations = _operations(shapes, prefix)
    places = {kind: f"{prefix}layers.{operations.index(kind)}." for kind in dict.fromkeys(operations)}
    found: dict[str, Any] = {
        "gaussians": gaussians,
        "width": width,
        "positions": "learned" if f"{prefix}fm_lifter.pos_embed.row_embed.weight" in shapes else "sine",
        "encoder": _stack_config(shapes, f"{prefix}attn_encoder.", "self_attn"),
        "operations": operations,
        "opacity": entries > GEOMETRY + width,
    }
    if "attention" in places:
        found["attention"] = _stack_config(shapes, places["attention"], "cross_attn")
    if "feed-forward" in places:
        place = places["feed-forward"]
        inputs = shapes[f"{place}layers.0.0.weight"][1]
        found["feed_forward"] = {
            "linear": count(shapes, f"{place}layers.{{}}."),
            "norm_in": f"{place}pre_norm_layer.weight" in shapes,
            "norm_out": f"{place}out_norm_layer.weight" in shapes,
            "shortcut": f"{place}identity_fc.weight" in shapes,
        }
        if "attention" in places:
            found["attention"]["shortcut"] = "concatenate" if inputs == 2 * width else "add"
    if "sparse-convolution" in places:
        place = places["sparse-convolution"]
        found["sparse_convolution"] = {
            "kernel": shapes[f"{place}conv.weight"][1],
            "projected": f"{place}output_proj.weight" in shapes,
        }
    return found


def embed_rules(options: Mapping[str, Any], published: str, ours: str) -> list[Rule]:
    """The names of what makes the Gaussians.

    Args:
        options: of `GaussianEmbed`, as plain data.
        published: what these names begin with.
        ours: what ours begin with.
    """
    stack = f"{published}attn_encoder.layers.{{layer}}"
    rules: list[Rule] = [
        Rename(f"{published}fm_lifter.input_proj.0.*", f"{ours}lifter.project.*"),
        Rename(f"{published}fm_lifter.input_proj.1.*", f"{ours}lifter.norm.*"),
        Rename(f"{published}fm_lifter.pos_embed.row_embed.*", f"{ours}lifter.rows.*"),
        Rename(f"{published}fm_lifter.pos_embed.col_embed.*", f"{ours}lifter.columns.*"),
        Rename(f"{published}gaussian_lifter.anchor", f"{ours}anchors"),
        Rename(f"{published}gaussian_lifter.instance_feature", f"{ours}instances"),
        Rename(f"{stack}.self_attn.*", f"{ours}encoder.{{layer}}.attention.*"),
        Rename(f"{stack}.*", f"{ours}encoder.{{layer}}.*"),
        Rename(f"{published}anchor_encoder.output_fc.*", f"{ours}anchor_encoder.out.*"),
    ]
    parts = ("xy", "rot", "scale", *(("opacity",) if options.get("opacity") else ()), "feature")
    for number, part in enumerate(parts):
        rules.append(Rename(f"{published}anchor_encoder.{part}_fc.*", f"{ours}anchor_encoder.parts.{number}.*"))
    operations = options["operations"]
    for index, operation in enumerate(operations):
        there, here = f"{published}layers.{index}.", f"{ours}operations.{index}."
        if index == len(operations) - 1:
            rules += [
                Rename(f"{there}range_scheduler.current_range_max", f"{ours}limit.bound"),
                Rename(f"{there}to_features.*", f"{ours}to_features.*"),
            ]
        rules += _operation_rules(operation, options, there, here)
    lowest, highest = options.get("scales", (0.1, 4.0))
    rules.append(Fresh(f"{ours}limit.mean", torch.tensor((lowest + highest) / 2)))
    return rules


def _stack_config(shapes: Shapes, prefix: str, attention: str) -> dict[str, int]:
    """Layers, heads and points of a stack with one level of deformable attention, which reads one more point."""
    first = f"{prefix}layers.0.{attention}"
    offsets, weights = (shapes[f"{first}.{name}.bias"][0] for name in ("sampling_offsets", "attention_weights"))
    heads = weights - offsets // 2
    return {"layers": count(shapes, f"{prefix}layers.{{}}."), "heads": heads, "points": offsets // 2 // heads}


def _operations(shapes: Shapes, prefix: str) -> list[str]:
    """The operations that have their entries under `prefix`, in order."""
    found = []
    for index in range(count(shapes, f"{prefix}layers.{{}}.")):
        there = f"{prefix}layers.{index}."
        operation = next((name for name, entry in _MARKS.items() if there + entry in shapes), None)
        if operation is None:
            raise KeyError(f"{there}{_MARKS['refine']}")
        found.append(operation)
    return found


def _template(name: str, operations: Sequence[str]) -> str:
    """Of an operation's weight, the entry that shares it, where operations of one kind are one; else the name itself.

    A weight that is shared is averaged under the first of its names, which is that of the template.
    """
    found = re.fullmatch(rf"{re.escape(EMBED)}layers\.(\d+)\.(.+)", name)
    return name if found is None else f"{EMBED}op_module_map.{OPERATIONS[operations[int(found[1])]]}.{found[2]}"


def _average(name: str) -> str:
    return AVERAGES + name.replace(".", "")


def _codebook_rules(quantizer: Mapping[str, Any]) -> list[Rule]:
    there, here = "quantize._codebook", "quantizer.learning"
    return [
        Rename(f"{there}.embed", "quantizer.codebook", squeeze=1),
        Rename(f"{there}.initted", f"{here}.initialised", squeeze=1),
        Rename(f"{there}.cluster_size", f"{here}.ema.counts", squeeze=1),
        Rename(f"{there}.embed_avg", f"{here}.ema.sums", squeeze=1),
        Fresh(f"{here}.revival.step", torch.tensor(0)),
        Fresh(f"{here}.revival.unused", torch.zeros(quantizer["codebook_size"], dtype=torch.int64)),
    ]


def _operation_rules(operation: str, options: Mapping[str, Any], there: str, here: str) -> list[Rule]:
    match operation:
        case "attention":
            return [
                Rename(f"{there}layers.{{layer}}.self_attn.*", f"{here}layers.{{layer}}.self_attention.*"),
                Rename(f"{there}layers.{{layer}}.cross_attn.*", f"{here}layers.{{layer}}.attention.*"),
                Rename(f"{there}layers.*", f"{here}layers.*"),
            ]
        case "feed-forward":
            return [
                Rename(f"{there}pre_norm_layer.*", f"{here}norm_in.*"),
                Rename(f"{there}out_norm_layer.*", f"{here}norm_out.*"),
                Rename(f"{there}identity_fc.*", f"{here}shortcut.*"),
                Rename(f"{there}layers.{{layer}}.0.*", f"{here}hidden.{{layer}}.*"),
                Rename(f"{there}layers.{options['feed_forward']['linear'] - 1}.*", f"{here}out.*"),
            ]
        case "refine":
            return [
                Rename(f"{there}layers.*", f"{here}head.*"),
                Unused(f"{there}to_features."),
                Unused(f"{there}range_scheduler."),
            ]
        case _:
            return [
                Kernel(f"{there}conv.weight", f"{here}conv.weight"),
                Rename(f"{there}output_proj.*", f"{here}out.*"),
                Unused(f"{there}grid_size"),
            ]
