"""Statistics of references in `.npz` files: those of ADM, pytorch-fid and clean-fid are read, ours are written, too.

    mu (D,), sigma (D, D)        of the features `pool`
    mu_s, sigma_s                of the features `spatial` (ADM's and ours)
    count, protocol              how many images, and how, as JSON (ours)

Legend: D feature width.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.core.files import parse_json, write_bytes
from smalti.eval.frechet import Gaussian
from smalti.eval.inception_weights import file_sha256
from smalti.eval.npz_images import IMAGES, NpzImages, array_names, opened_member, values_of

FEATURES = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
WIDEST = 1 << 14  # features: their covariance takes 2 GiB
LONGEST = 1 << 20  # bytes of what a file says of its making


class Moments(NamedTuple):
    """Mean `(D,)` and covariance `(D, D)`, float64."""

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class StatisticsFile:
    """What a file of statistics holds.

    Attributes:
        path: of the file.
        sha256: of the file.
        statistics: by name of the feature.
        count: images that they are of, None where the file does not tell.
        protocol: what the file says of its making, None of others' files.
        images: how many images lie beside them, as in ADM's reference batches.
    """

    path: Path
    sha256: str
    statistics: Mapping[str, Gaussian]
    count: int | None
    protocol: dict[str, Any] | None
    images: int


def is_statistics(path: Path) -> bool:
    """Whether an `.npz` file holds statistics; errors as `array_names`."""
    return "mu" in array_names(path)


def read_statistics(path: Path) -> StatisticsFile:
    """Read a file of ADM, pytorch-fid, clean-fid or ours.

    Raises:
        UserError: damaged, or arrays that are no mean and covariance.
    """
    names = array_names(path)
    found: dict[str, Gaussian] = {
        feature: _moments(path, *arrays) for feature, arrays in FEATURES.items() if names.issuperset(arrays)
    }
    if "pool" not in found:
        raise UserError(f"{path} has no statistics, expected arrays mu (D,) and sigma (D, D)")
    count = _value(path, "count", "iu") if "count" in names else None
    protocol = _protocol(path) if "protocol" in names else None
    images = len(NpzImages(path)) if IMAGES in names else 0
    return StatisticsFile(path, file_sha256(path), found, count, protocol, images)


def _moments(path: Path, mean_name: str, covariance_name: str) -> Moments:
    """Shapes are looked at before anything is unpacked: a small file can name vast arrays."""
    with (
        opened_member(path, mean_name) as (means, row, kind),
        opened_member(path, covariance_name, symmetric=True) as (covariances, square, other),
    ):
        real = all(np.can_cast(values, np.float64) for values in (kind, other))
        if len(row) != 1 or 0 in row or square != row * 2 or not real:
            raise UserError(
                f"{path}: {mean_name} {kind} {row} and {covariance_name} {other} {square} are no mean (D,) and "
                "covariance (D, D)"
            )
        if row[0] > WIDEST:
            raise UserError(f"{path}: {mean_name} is of {row[0]} values, statistics are read of up to {WIDEST}")
        arrays = values_of(path, means, row, kind), values_of(path, covariances, square, other)
    moments = Moments(*(torch.from_numpy(np.array(values, np.float64)) for values in arrays))
    if not all(bool(values.isfinite().all()) for values in moments):
        raise UserError(f"{path}: {mean_name} and {covariance_name} hold values that are not finite")
    return moments


def _value(path: Path, name: str, kinds: str) -> Any:
    """The only value of an array without axes, whose type is of one of NumPy's `kinds`."""
    with opened_member(path, name) as (file, shape, dtype):
        if shape or dtype.kind not in kinds or not 0 < dtype.itemsize <= LONGEST:
            raise UserError(f"{path} is damaged: {name} is {dtype} {shape}, expected a single value")
        return values_of(path, file, shape, dtype).item()


def _protocol(path: Path) -> Any:
    """What a file of ours says of its making; `smalti.eval.evaluation_sides` looks at what is in it."""
    try:
        return parse_json(_value(path, "protocol", "U"))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is damaged: its protocol is no JSON: {error}") from None


def write_statistics(path: Path, statistics: Mapping[str, Gaussian], count: int, protocol: Mapping[str, Any]) -> None:
    """Write a file that we, pytorch-fid and clean-fid read; the same content gives the same bytes."""
    arrays: dict[str, Any] = {}
    for feature, (mean, covariance) in FEATURES.items():
        if feature in statistics:
            arrays[mean] = statistics[feature].mean.numpy()
            arrays[covariance] = statistics[feature].covariance.numpy()
    arrays |= {"count": np.array(count), "protocol": np.array(json.dumps(protocol, sort_keys=True))}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_bytes(path, buffer.getvalue())
