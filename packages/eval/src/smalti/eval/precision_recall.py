"""Improved precision and recall of samples in a feature space (Kynkäänniemi et al. 2019).

Legend: N samples, M references, D width of their features, R C rows and columns of one block of distances.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from smalti.core.errors import UserError
from smalti.eval.distances import Rounding, centre_of, distance_blocks, moved, radii
from smalti.eval.feature_rows import check_sets


class Memberships(NamedTuple):
    """`samples` `(N,)`: whether each lies in the manifold of the references; `references` `(M,)`: the reverse."""

    samples: Tensor
    references: Tensor


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1].

    `precision`: of samples that lie in the manifold of the references; `recall`: of references that lie in
    the manifold of the samples.
    """

    precision: float
    recall: float


def definition(neighbours: int, distances: Rounding = "float32") -> str:
    """The definition in words, for protocols."""
    return (
        "Kynkäänniemi et al. 2019 in ADM's form: balls with the squared distance to the k-th nearest other vector of "
        f"the same set as radius, k = {neighbours}, borders included, distances in {distances}"
    )


def precision_recall(
    samples: Tensor, references: Tensor, neighbours: int = 3, distances: Rounding = "float32"
) -> PrecisionRecall:
    """Precision and recall of samples `(N, D)` against references `(M, D)`: the shares of their `memberships`."""
    return shares(memberships(samples, references, neighbours, distances))


def shares(found: Memberships) -> PrecisionRecall:
    """Precision and recall that follow from memberships."""
    return PrecisionRecall(*(int(inside.sum()) / len(inside) for inside in found))


@torch.no_grad()
def memberships(
    samples: Tensor, references: Tensor, neighbours: int = 3, distances: Rounding = "float32"
) -> Memberships:
    """Which samples and references lie in the manifold of the other set (section 3, eq. 1 and 2).

    The manifold of a set is the union of balls around its vectors, each as large as the distance to the
    vector's `neighbours`-th nearest other vector of the set; a vector on a border lies inside. Distances are
    computed in blocks: memory grows with N + M, not with N x M.

    Args:
        samples: `(N, D)`.
        references: `(M, D)`.
        neighbours: k.
        distances: `float16` rounds as ADM's evaluator does. Balls then have the radius of the (k + 1)-th smallest
            distance, that of a vector from itself among them, which the rounding can take above 0.

    Raises:
        UserError: other shapes, values that are not finite, or no more vectors than `neighbours` in a set.
    """
    check_neighbours(samples, references, neighbours)
    centre = centre_of(references) if distances == "float32" else None
    if centre is None:
        samples, references = samples.float(), references.float()
        own = radii(samples, neighbours, distances)
    else:
        own, references = radii(moved(samples, centre), neighbours), moved(references, centre)
    others = radii(references, neighbours, distances)
    inside = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)
    covered = torch.zeros(len(references), dtype=torch.bool, device=references.device)
    for rows, columns, found in distance_blocks(samples, references, distances, centre=centre):
        # a - b <= 0 just where a <= b, and minima are quicker than comparisons.
        inside[rows] |= (found - others[columns]).amin(1) <= 0
        covered[columns] |= found.sub_(own[rows, None]).amin(0) <= 0
    return Memberships(inside, covered)


def check_neighbours(samples: Tensor, references: Tensor, neighbours: int) -> None:
    """Raise a `UserError` unless both sets are finite, of one width, and have more vectors than `neighbours`."""
    check_sets(samples, references, at_least=1)
    for name, features in (("samples", samples), ("references", references)):
        if neighbours < 1 or len(features) <= neighbours:
            raise UserError(f"{neighbours} neighbours need more vectors than that, got {len(features)} {name}")
