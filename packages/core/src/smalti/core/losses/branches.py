"""Branches of a latent: groups of channels, each of which a product quantizer gives codes of their own.

Legend: B batch, D latent width, d width of a branch.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.losses.loss import Model, Reconstruction

Branches = Annotated[int, Field(ge=1)]


def branch_width(model: Model, branches: int) -> int:
    """d, the width of each of `branches` equal branches of the tokenizer's latent.

    Raises:
        UserError: it has no quantizer with a latent, or one that cannot be cut so.
    """
    width = getattr(getattr(model, "quantizer", None), "dim", None)
    if not isinstance(width, int):
        raise UserError(f"the {model.kind} {model.options.name!r} has no quantizer with a latent to compare")
    if width % branches:
        raise UserError(f"a latent of width {width} cannot be cut into {branches} branches")
    return width // branches


def branch_latent(output: Reconstruction, branches: int, branch: int) -> Tensor:
    """Branch `branch` of the latent after quantization, `(B, *space, d)`, with the quantizer's gradient.

    Raises:
        UserError: the tokenizer does not give its latent.
    """
    latent = output.features.get("latent")
    if latent is None:
        given = ", ".join(output.features) or "none"
        raise UserError(f"the loss needs the tokenizer's feature 'latent', it gives {given}")
    return latent.chunk(branches, dim=-1)[branch]
