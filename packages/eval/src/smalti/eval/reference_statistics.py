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
from smalti.core.files import write_bytes
from smalti.eval.frechet import Gaussian
from smalti.eval.inception_weights import file_sha256
from smalti.eval.npz_images import array_names

FEATURES = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


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
    found: dict[str, Gaussian] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for feature, (mean, covariance) in FEATURES.items():
                if mean in names and covariance in names:
                    found[feature] = _moments(path, mean, file[mean], covariance, file[covariance])
            count = int(file["count"]) if "count" in names else None
            protocol = json.loads(str(file["protocol"])) if "protocol" in names else None
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  # whatever stops the reading of a stranger's file is its damage
        raise UserError(f"{path} is damaged or not a file of statistics: {str(error)[:200]}") from None
    if "pool" not in found:
        raise UserError(f"{path} has no statistics, expected arrays mu (D,) and sigma (D, D)")
    images = 0
    if "arr_0" in names:
        from smalti.eval.npz_images import NpzImages

        images = len(NpzImages(path))
    return StatisticsFile(path, file_sha256(path), found, count, protocol, images)


def _moments(path: Path, mean_name: str, mean: Any, covariance_name: str, covariance: Any) -> Moments:
    width = mean.size
    if mean.shape != (width,) or covariance.shape != (width, width) or not width:
        raise UserError(
            f"{path}: {mean_name} {mean.shape} and {covariance_name} {covariance.shape} are no mean (D,) and "
            "covariance (D, D)"
        )
    moments = Moments(*(torch.from_numpy(np.asarray(values, np.float64)) for values in (mean, covariance)))
    if not all(bool(values.isfinite().all()) for values in moments):
        raise UserError(f"{path}: {mean_name} and {covariance_name} hold values that are not finite")
    return moments


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
