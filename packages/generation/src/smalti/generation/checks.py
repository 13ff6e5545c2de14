"""Checks of what a generator is given: its options, a layout, and batches, with one look at the device per call."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import AfterValidator, Field, ValidationInfo
from torch import Tensor

from smalti.core.contracts import check_labels
from smalti.core.errors import UserError
from smalti.core.layout import TokenLayout


def _divide_dim(heads: int, info: ValidationInfo) -> int:
    dim = info.data.get("dim")
    if dim is not None and dim % heads:
        raise ValueError(f"dim {dim} must be a multiple of the number of heads")
    return heads


Heads = Annotated[int, Field(ge=1), AfterValidator(_divide_dim)]
"""Of attention, as an option behind `dim`, which they divide."""


def refused(layout: TokenLayout, predicts: str, *, flatten: bool) -> str | None:
    """Why a generator of single tokens cannot take a layout, as `supports` says it; None where it can.

    Args:
        layout: of the tokens.
        predicts: what the generator does instead of scales, for the sentence.
        flatten: it takes several streams, one after the other at each position.
    """
    if layout.kind == "scales":
        return f"it predicts {predicts}, not scale by scale"
    if layout.streams != 1 and not flatten:
        return f"it models one stream of codes, not {layout.streams}, unless flatten is on"
    return None


def check_batch(tokens: Tensor, labels: Tensor | None, layout: TokenLayout, classes: int) -> None:
    """Check a training batch.

    Args:
        tokens: `(B, L, S)` int64.
        labels: `(B,)`; None where the condition is no class.
        layout: of the tokens.
        classes: labels lie in `[0, classes)`.

    Raises:
        UserError: a wrong shape or dtype; outside of compiled graphs also a token outside its codebook, and a label out
            of range.
    """
    if tokens.dtype != torch.int64 or tokens.ndim != 3 or tokens.shape[1:] != (layout.positions, layout.streams):
        raise UserError(
            f"tokens of {layout} must be int64 (B, {layout.positions}, {layout.streams}), "
            f"got {tokens.dtype} {tuple(tokens.shape)}"
        )
    if labels is not None and labels.shape != tokens.shape[:1]:
        raise UserError(f"labels must be ({tokens.shape[0]},), one per image, got {tuple(labels.shape)}")
    if torch.compiler.is_compiling():
        return  # values cannot be looked at within a compiled graph
    streams = zip(tokens.unbind(-1), layout.vocab, strict=True)
    outside = torch.stack([(codes < 0) | (codes >= size) for codes, size in streams], dim=-1)
    wrong = outside.any() if labels is None else outside.any() | ((labels < 0) | (labels >= classes)).any()
    # Reading a value waits for the device, so both questions are asked at once.
    if bool(wrong):
        if labels is not None:
            check_labels(labels, classes)
        stream = int(outside.nonzero()[0, 2])
        raise UserError(
            f"token {int(tokens[outside][0])} is out of range: stream {stream} of the layout has "
            f"{layout.vocab[stream]} codes, 0 to {layout.vocab[stream] - 1}"
        )
