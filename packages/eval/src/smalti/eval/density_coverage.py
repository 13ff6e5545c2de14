"""Density and coverage of samples in a feature space (Naeem et al. 2020).

Legend: N samples, M references, D width of their features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from smalti.eval.distances import centre_of, distance_blocks, moved, radii
from smalti.eval.precision_recall import check_neighbours


class Balls(NamedTuple):
    """`counts` int64 `(N,)`: in how many balls around references each sample lies; `covered` `(M,)`: a sample is in."""

    counts: Tensor
    covered: Tensor


class DensityCoverage(NamedTuple):
    """What the balls around references say.

    `density`: mean number of balls that a sample lies in, divided by k; about 1 for samples like the references, and
    more where they crowd together. `coverage`: share of the balls with a sample in them, 0 to 1.
    """

    density: float
    coverage: float


def definition(neighbours: int) -> str:
    """The definition in words, for protocols."""
    return (
        "Naeem et al. 2020: balls around references up to the k-th nearest other reference, "
        f"k = {neighbours}, borders included, distances in float32"
    )


def density_coverage(samples: Tensor, references: Tensor, neighbours: int = 5) -> DensityCoverage:
    """Density and coverage of samples `(N, D)` against references `(M, D)`, from their `balls`."""
    return shares(balls(samples, references, neighbours), neighbours)


def shares(found: Balls, neighbours: int) -> DensityCoverage:
    """Density and coverage that follow from balls of the `neighbours`-th nearest reference."""
    density = int(found.counts.sum()) / (neighbours * len(found.counts))
    return DensityCoverage(density, int(found.covered.sum()) / len(found.covered))


@torch.no_grad()
def balls(samples: Tensor, references: Tensor, neighbours: int = 5) -> Balls:
    """Which samples lie in which balls, in blocks as `smalti.eval.precision_recall.memberships`.

    A sample on the border of a ball lies inside, as in precision and recall; the authors' code leaves it out. The
    two differ only where distances are equal, as with copies of references.

    Args:
        samples: `(N, D)`.
        references: `(M, D)`.
        neighbours: k.

    Raises:
        UserError: other shapes, values that are not finite, or no more vectors than `neighbours` in a set.
    """
    check_neighbours(samples, references, neighbours)
    centre = centre_of(references)
    references = moved(references, centre)
    sizes = radii(references, neighbours)
    counts = torch.zeros(len(samples), dtype=torch.int64, device=samples.device)
    covered = torch.zeros(len(references), dtype=torch.bool, device=references.device)
    for rows, columns, found in distance_blocks(samples, references, "float32", centre=centre):
        inside = found <= sizes[columns]
        counts[rows] += inside.sum(1)
        covered[columns] |= inside.any(0)
    return Balls(counts, covered)
