"""The features of a set of images, kept one by one.

Legend: N images of the set, B batch, D feature width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from smalti.core.errors import UserError


class FeatureRows:
    """Features that arrive in batches and are wanted as one matrix.

    Batches that come with the places of their images in the set are put in this order, whoever saw them first;
    others stay in the order of arrival.
    """

    def __init__(self) -> None:
        self._device: str | torch.device = "cpu"
        self._rows: list[Tensor] = []
        self._indices: list[Tensor] = []

    def __len__(self) -> int:
        return sum(map(len, self._rows))

    def update(self, features: Tensor, indices: Tensor | None = None) -> None:
        """Take in features `(B, D)`, which keep their float type, of the images at `indices` int64 `(B,)`.

        Raises:
            UserError: not `(B, D)`, another D than before, values that are not finite, indices that do not match.
        """
        check_features(features, len(self))
        if not len(features):
            return
        if indices is not None and (indices.shape != (len(features),) or indices.dtype != torch.int64):
            raise UserError(
                f"indices must be int64 ({len(features)},), one for each feature vector, got {indices.dtype} "
                f"{tuple(indices.shape)}"
            )
        self._add(features.detach().to(self._device, copy=True), indices)

    def merge(self, other: FeatureRows) -> None:
        """Take in what `other` has seen; without indices it comes after what this has seen.

        Raises:
            UserError: its features are of another width, or one of both has indices and the other has none.
        """
        if len(other):
            self._add(other._joined().to(self._device), torch.cat(other._indices) if other._indices else None)

    def _add(self, rows: Tensor, indices: Tensor | None) -> None:
        if self._rows and rows.shape[1] != self._rows[0].shape[1]:
            raise UserError(
                f"features of {rows.shape[1]} values do not go with earlier ones of {self._rows[0].shape[1]}"
            )
        if self._rows and bool(self._indices) != (indices is not None):
            raise UserError("give indices with every batch of features or with none")
        self._rows.append(rows)
        if indices is not None:
            self._indices.append(indices.cpu())

    def _joined(self) -> Tensor:
        if len(self._rows) > 1:
            self._rows = [torch.cat(self._rows)]
        return self._rows[0]

    @property
    def rows(self) -> Tensor:
        """All features `(N, D)`, by index or in the order of arrival.

        Raises:
            UserError: there are none, or an image was given twice.
        """
        if not self._rows:
            raise UserError("there are no features yet: call update(features) first")
        rows = self._joined()
        if not self._indices:
            return rows
        indices, order = torch.cat(self._indices).sort(stable=True)
        repeated = indices[1:] == indices[:-1]
        if bool(repeated.any()):
            raise UserError(f"image {int(indices[1:][repeated][0])} was given twice: a sampler may have padded the set")
        if bool((order[1:] > order[:-1]).all()):
            return rows
        self._rows, self._indices = [rows[order.to(rows.device)]], [indices]
        return self._rows[0]

    def state_dict(self) -> dict[str, Tensor]:
        """What it has seen: `rows` `(N, D)` and `indices` `(N,)` or `(0,)`; empty where it has seen nothing."""
        if not self._rows:
            return {}
        indices = torch.cat(self._indices) if self._indices else torch.empty(0, dtype=torch.int64)
        return {"rows": self._joined(), "indices": indices}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        self._rows = [state["rows"].to(self._device)] if state else []
        self._indices = [state["indices"]] if state and len(state["indices"]) else []

    def to(self, device: str | torch.device) -> Self:
        """Keep the features on `device` from now on."""
        self._device = device
        self._rows = [rows.to(device) for rows in self._rows]
        return self


def is_finite(values: Tensor) -> bool:
    """Whether all values are, in one pass: infinities are extremes, and a NaN makes both extremes NaN."""
    return not values.numel() or bool(torch.stack(values.aminmax()).isfinite().all())


def check_features(features: Tensor, seen: int = 0) -> None:
    """Raise a `UserError` unless `features` is a finite float `(B, D)`.

    Args:
        features: to be checked.
        seen: vectors before these, for the number of the one that is not finite.
    """
    if features.ndim != 2 or not features.is_floating_point():
        raise UserError(f"features must be float (B, D), got {features.dtype} {tuple(features.shape)}")
    if not is_finite(features):
        row = int((~features.isfinite()).any(1).nonzero()[0])
        raise UserError(f"features must be finite, but vector {seen + row} is not")


def check_sets(samples: Tensor, references: Tensor, at_least: int) -> None:
    """Raise a `UserError` unless samples and references are finite, of one width, and enough.

    Args:
        samples: `(N, D)`.
        references: `(M, D)`.
        at_least: so many vectors in each.
    """
    if samples.ndim != 2 or references.ndim != 2 or samples.shape[1] != references.shape[1]:
        raise UserError(
            f"samples and references must be (N, D) and (M, D), got {tuple(samples.shape)} and "
            f"{tuple(references.shape)}"
        )
    for name, features in (("samples", samples), ("references", references)):
        if len(features) < at_least:
            raise UserError(f"at least {at_least} {name} are needed, got {len(features)}")
        if not features.is_floating_point() or not is_finite(features):
            raise UserError(f"features must be finite, but those of the {name} are not")
