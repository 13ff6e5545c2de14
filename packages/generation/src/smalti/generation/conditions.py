"""What stands before the tokens: a class, or a caption.

Both modules embed a batch of conditions to a prefix of the sequence; where `null` says so, to the null prefix, which
guidance needs and label dropout trains.

Legend: B batch, P prefix positions, E width of caption features, D width of the model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalti.core.captions import CaptionOptions
from smalti.core.contracts import check_labels
from smalti.core.errors import UserError


class ClassPrefix(nn.Module):
    """Labels `(B,)` in `[0, classes]` to one position; label `classes` is the null class."""

    length = 1

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.classes = classes
        self.table = nn.Embedding(classes + 1, dim)

    def forward(self, labels: Tensor, null: Tensor | None = None) -> Tensor:
        """Labels `(B,)` to `(B, 1, D)`; `null` `(B,)` is true for the null class."""
        if null is not None:
            labels = labels.masked_fill(null, self.classes)
        prefix: Tensor = self.table(labels)[:, None]
        return prefix

    def padding(self, labels: Tensor) -> None:
        """There is none."""

    def check(self, labels: Tensor) -> None:
        """Raise a `UserError` for a label outside `[0, classes)`."""
        check_labels(labels, self.classes)


class CaptionPrefix(nn.Module):
    """Features of captions `(B, P, E)` to P positions, by a linear layer, GELU, and a linear layer.

    The null caption is a constant, drawn once.
    """

    def __init__(self, options: CaptionOptions, dim: int) -> None:
        super().__init__()
        self.length, self.width = options.length, options.width
        self.null: Tensor
        self.register_buffer("null", torch.randn(options.length, options.width) / options.width**0.5)
        self.inner = nn.Linear(options.width, dim, bias=False)
        self.outer = nn.Linear(dim, dim, bias=False)

    def forward(self, captions: Tensor, null: Tensor | None = None) -> Tensor:
        """Captions `(B, P, E)` to `(B, P, D)`; `null` `(B,)` is true for the null caption."""
        if null is not None:
            captions = torch.where(null[:, None, None], self.null, captions)
        prefix: Tensor = self.outer(F.gelu(self.inner(captions), approximate="tanh"))
        return prefix

    def padding(self, captions: Tensor) -> Tensor:
        """`(B, P)`, true where a row holds no features; the null caption stands in for as many as its caption has."""
        return (captions == 0).all(-1)

    def check(self, captions: Tensor) -> None:
        """Raise a `UserError` for features of another shape."""
        if captions.ndim != 3 or captions.shape[1:] != (self.length, self.width) or not captions.is_floating_point():
            raise UserError(
                f"captions must be float (B, {self.length}, {self.width}), left-padded with zero rows, got "
                f"{captions.dtype} {tuple(captions.shape)}"
            )


def dropped_labels(labels: Tensor, chance: float) -> Tensor | None:
    """Where label dropout puts the null condition, for guidance to learn it: bool `(B,)`, by torch's global generator.

    Args:
        labels: classes `(B,)`, or captions `(B, P, E)`.
        chance: of each; with 0 there is nothing to put, None.
    """
    return torch.rand(labels.shape[:1], device=labels.device) < chance if chance else None
