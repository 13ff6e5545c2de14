"""Improved precision and recall of samples in a feature space (Kynkäänniemi et al. 2019).

Legend: N samples, M references, D width of their features, R rows of one block of distances.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from smalti.core.errors import UserError

BLOCK_ROWS = 1024


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1].

    `precision`: of samples that lie in the manifold of the references; `recall`: of references that lie in
    the manifold of the samples.
    """

    precision: float
    recall: float


def definition(neighbours: int) -> str:
    """The definition in words, for protocols."""
    return (
        "Kynkäänniemi et al. 2019 in ADM's form: balls with the squared distance to the k-th nearest other vector of "
        f"the same set as radius, k = {neighbours}, borders included, distances in float32"
    )


def precision_recall(samples: Tensor, references: Tensor, neighbours: int = 3) -> PrecisionRecall:
    """Precision and recall of samples `(N, D)` against references `(M, D)` (section 3, eq. 1 and 2).

    The manifold of a set is the union of balls around its vectors, each as large as the distance to the
    vector's `neighbours`-th nearest other vector of the set; a vector on a border lies inside. Distances are
    float32, computed in blocks: memory grows with N + M, not with N x M.

    Raises:
        UserError: other shapes, values that are not finite, or no more vectors than `neighbours` in a set.
    """
    if samples.ndim != 2 or references.ndim != 2 or samples.shape[1] != references.shape[1]:
        raise UserError(
            f"samples and references must be (N, D) and (M, D), got {tuple(samples.shape)} and "
            f"{tuple(references.shape)}"
        )
    for name, features in (("samples", samples), ("references", references)):
        if neighbours < 1 or len(features) <= neighbours:
            raise UserError(f"{neighbours} neighbours need more vectors than that, got {len(features)} {name}")
        if not bool(features.isfinite().all()):
            raise UserError(f"features must be finite, but those of the {name} are not")
    # Distances do not change when both sets are moved; near the origin |u|^2 - 2uv + |v|^2 cancels least.
    centre = references.double().mean(0)
    samples, references = (samples.double() - centre).float(), (references.double() - centre).float()
    sample_radii, reference_radii = _radii(samples, neighbours), _radii(references, neighbours)
    precise = 0
    covered = torch.zeros(len(references), dtype=torch.bool, device=references.device)
    for block, radii in zip(samples.split(BLOCK_ROWS), sample_radii.split(BLOCK_ROWS), strict=True):
        distances = _squared_distances(block, references)
        precise += int((distances <= reference_radii).any(1).sum())
        covered |= (distances <= radii[:, None]).any(0)
    return PrecisionRecall(precise / len(samples), int(covered.sum()) / len(references))


def _radii(features: Tensor, neighbours: int) -> Tensor:
    """Squared distance of each vector to its `neighbours`-th nearest other one, `(N,)`."""
    radii = []
    for start in range(0, len(features), BLOCK_ROWS):
        distances = _squared_distances(features[start : start + BLOCK_ROWS], features)
        distances.diagonal(start).fill_(torch.inf)  # a vector is no neighbour of itself
        radii.append(distances.kthvalue(neighbours, dim=1).values)
    return torch.cat(radii)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """`(R, M)`, float32, never negative."""
    lengths = a.square().sum(1)[:, None] + b.square().sum(1)
    return torch.addmm(lengths, a, b.T, alpha=-2).clamp_(min=0)
