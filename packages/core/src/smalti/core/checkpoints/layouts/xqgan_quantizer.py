"""The quantizers of XQ-GAN's checkpoints: one branch or several, one scale or several, with codes or with bits.

Legend: P branches, K scales, C width of one branch, V codes of one branch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smalti.core.checkpoints.layout import Shapes, count
from smalti.core.checkpoints.layouts.vqgan_rules import phi_convolutions, phi_rules
from smalti.core.checkpoints.rules import Rename, Rule

# Scales cannot be seen in shapes, only how many there are, and the side of the latent: the published lists.
SCALES = {
    (10, 11): [1, 1, 2, 3, 3, 4, 5, 6, 8, 11],
    (10, 16): [1, 2, 3, 4, 5, 6, 8, 10, 13, 16],
}

# Usage statistics; a scale per level, which the options hold.
IGNORED = ("quantize.ema_vocab_hit_SV", "quantizes.*.ema_vocab_hit_SV", "quantize.scaler", "quantizes.*.scaler")


def branches_of(shapes: Shapes) -> int:
    """P: several branches lie in a list, one alone has a name of its own."""
    return count(shapes, "quantizes.{}.") or 1


def quantizer_config(shapes: Shapes, width: int, side: int) -> dict[str, Any]:
    """The quantizer's options.

    Where the list of scales is none of the published ones, `scales` is left out and has to be given.

    Args:
        shapes: of the published entries.
        width: C.
        side: of the latent grid.
    """
    branches = branches_of(shapes)
    prefix = "quantize" if branches == 1 else "quantizes.0"
    unit = _unit(shapes, prefix, width, side)
    return unit if branches == 1 else {"name": "product", "quantizers": [unit], "branches": branches}


def _unit(shapes: Shapes, prefix: str, width: int, side: int) -> dict[str, Any]:
    hits = shapes[f"{prefix}.ema_vocab_hit_SV"]
    bits = f"{prefix}.scaler" in shapes
    scales = hits[0] if len(hits) == 2 else 1
    if len(hits) == 1:
        return {"name": "vq", "dim": width, "codebook_size": hits[-1], "cosine": True}
    # The commitment loss of the class with codes is a sum over scales, ours a mean.
    config: dict[str, Any] = {
        "name": "multi-scale",
        "quantizer": _bits(width) if bits else _codes(width, hits[-1]),
        "phi": phi_convolutions(shapes, prefix),
        "normalise": bits,
        "commitment_weight": 0.25 if bits else 0.25 * scales,
    }
    if (scales, side) in SCALES:
        config["scales"] = list(SCALES[scales, side])
    return config


def _codes(width: int, size: int) -> dict[str, Any]:
    return {"name": "vq", "dim": width, "codebook_size": size, "cosine": True, "unit_length": "search"}


def _bits(width: int) -> dict[str, Any]:
    return {"name": "bsq", "bits": [width], "commitment_weight": 0.0, "entropy_weight": 0.1, "entropy_group": 1}


def quantizer_rules(quantizer: Mapping[str, Any]) -> list[Rule]:
    """How the entries translate for options that `quantizer_config` gave."""
    if quantizer["name"] == "product":
        return _rules(quantizer["quantizers"][0], "quantizes.{branch}", "quantizer.units.{branch}")
    return _rules(quantizer, "quantize", "quantizer")


def _rules(unit: Mapping[str, Any], published: str, ours: str) -> list[Rule]:
    if unit["name"] == "vq":
        return [Rename(f"{published}.embedding.weight", f"{ours}.codebook")]
    return [
        Rename(f"{published}.embedding.weight", f"{ours}.units.0.codebook"),
        *phi_rules(unit["phi"], len(unit["scales"]), published, ours),
    ]
