"""Squared Euclidean distances between two sets of features, one block at a time.

Legend: N M vectors of the sets, D their width, R C rows and columns of a block.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from smalti.core.matmul import has_packed_products, true_float32

BLOCK = 1024
GROUPS = 32
LARGEST_HALF = 65504.0
# ADM's evaluator decides for so many rows and columns at once whether float16 is enough.
ADM_BLOCK = 10_000

Rounding = Literal["float32", "float16"]

Distances = Callable[[Tensor], Tensor]
"""Vectors `(R, D)` to their squared distances `(R, C)` from the columns that it was made for."""


def centre_of(references: Tensor) -> Tensor:
    """The mean `(D,)` of references `(M, D)`, of their float type or of float32 where that is wider.

    Distances do not change when both sets are moved; near the origin |u|^2 - 2uv + |v|^2 cancels least.
    """
    total = torch.zeros(references.shape[1], dtype=torch.float64, device=references.device)
    for block in references.split(BLOCK):
        total += block.sum(0, dtype=torch.float64)
    return (total / len(references)).to(torch.promote_types(references.dtype, torch.float32))


def moved(vectors: Tensor, centre: Tensor) -> Tensor:
    """Vectors `(N, D)` with the origin at `centre`, as float32."""
    target = torch.empty(vectors.shape, dtype=torch.float32, device=vectors.device)
    for block, place in zip(vectors.split(BLOCK), target.split(BLOCK), strict=True):
        place.copy_(block - centre)
    return target


def float32_distances(columns: Tensor) -> Distances:
    """Distances in float32 from `columns`, float32 `(C, D)`."""
    lengths = _lengths(columns)
    if columns.device.type == "cpu" and has_packed_products():
        # oneDNN's own order of weights: twice the speed of addmm on some processors.
        weight = torch.ops.mkldnn._reorder_linear_weight(-2 * columns, BLOCK)

        def packed(rows: Tensor) -> Tensor:
            products: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, lengths, "none", [], "")
            return products.add_(_lengths(rows)[:, None]).clamp_(min=0)

        return packed
    turned = columns.T

    def plain(rows: Tensor) -> Tensor:
        return torch.addmm(lengths + _lengths(rows)[:, None], rows, turned, alpha=-2).clamp_(min=0)

    return plain


def _lengths(vectors: Tensor) -> Tensor:
    """Squared, `(R,)`, without squares of all values in memory."""
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=1)
    return lengths.square()


def half_distances(columns: Tensor) -> Distances:
    """Distances as ADM's evaluator rounds them, as float32: vectors, squares, products and sums all in float16.

    Only within a sum or a product are terms added up in float32. What does not fit into float16 is not finite.
    """
    rounded = columns.half()
    lengths = _half_lengths(rounded)
    turned = rounded.float().T.contiguous()

    def half(rows: Tensor) -> Tensor:
        vectors = rows.half()
        products = (vectors.float() @ turned).half()
        return ((_half_lengths(vectors)[:, None] - 2 * products) + lengths).clamp_(min=0).float()

    return half


def _half_lengths(vectors: Tensor) -> Tensor:
    return vectors.square().sum(1, dtype=torch.float32).half()


def distance_blocks(
    rows: Tensor, columns: Tensor, rounding: Rounding, *, upper: bool = False, centre: Tensor | None = None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """All squared distances of two sets in blocks: which rows, which columns, and the distances `(R, C)`.

    A block is valid until the next one and may be changed.

    Args:
        rows: float32 `(N, D)`, or of any float type where there is a `centre`.
        columns: float32 `(M, D)`.
        rounding: `float16` is that of `half_distances`, except for parts that do not fit into it.
        upper: leave out blocks below the diagonal.
        centre: where the rows are still to be moved, block by block, so that there is no second copy of them.
    """
    with true_float32():
        for some_columns in _spans(0, len(columns), ADM_BLOCK):
            for some_rows in _spans(0, len(rows), ADM_BLOCK):
                halved = rounding == "float16" and _fits_half(rows[some_rows], columns[some_columns])
                for column in _spans(some_columns.start, some_columns.stop, BLOCK):
                    distances = (half_distances if halved else float32_distances)(columns[column])
                    for row in _spans(some_rows.start, some_rows.stop, BLOCK):
                        if not upper or row.start <= column.start:
                            yield row, column, distances(rows[row] if centre is None else moved(rows[row], centre))


def _spans(start: int, stop: int, size: int) -> list[slice]:
    return [slice(place, min(place + size, stop)) for place in range(start, stop, size)]


def _fits_half(rows: Tensor, columns: Tensor) -> bool:
    """Whether all that `half_distances` computes between two sets is finite."""
    largest = sum(float(vectors.half().float().square().sum(1).max().sqrt()) for vectors in (rows, columns))
    if 1.01 * largest**2 < LARGEST_HALF:
        return True
    found = (half_distances(column)(row) for column in columns.split(BLOCK) for row in rows.split(BLOCK))
    return all(bool(distances.isfinite().all()) for distances in found)


def radii(vectors: Tensor, neighbours: int, rounding: Rounding = "float32") -> Tensor:
    """Squared distance of each of the vectors, float32 `(N, D)`, to its `neighbours`-th nearest other one, `(N,)`.

    In float16 the vector itself is looked at, too, and one neighbour more, as ADM's evaluator does: rounding can take
    its distance from itself above 0.
    """
    exact = rounding == "float32"
    count = neighbours if exact else neighbours + 1
    # By first row the nearest of every block, put together once at the end: a few numbers for each vector and block.
    nearest: dict[int, list[Tensor]] = defaultdict(list)
    for rows, columns, distances in distance_blocks(vectors, vectors, rounding, upper=exact):
        own = rows == columns
        if exact and own:
            distances.fill_diagonal_(torch.inf)
        nearest[rows.start].append(smallest(distances, count))
        if exact and not own:  # the same distances, seen from the other side
            nearest[columns.start].append(smallest(distances.T, count))
    return torch.cat([torch.cat(nearest[start], 1).kthvalue(count).values for start in sorted(nearest)])


def smallest(distances: Tensor, count: int) -> Tensor:
    """The `count` smallest of every row, `(R, count)` in any order; all of them where there are fewer.

    The smallest values lie in the groups with the smallest minima: minima are quick, and few values are left to sort.
    """
    columns = distances.shape[1]
    whole = columns - columns % GROUPS
    if whole < 8 * GROUPS or count > GROUPS:
        return distances.topk(min(count, columns), dim=1, largest=False, sorted=False).values
    groups = distances[:, :whole].unflatten(1, (whole // GROUPS, GROUPS))
    turned = distances.stride(0) == 1  # then minima are quick only in the order of memory
    minima = groups.permute(1, 2, 0).amin(0).T.contiguous() if turned else groups.amin(1)
    nearest = minima.topk(count, dim=1, largest=False, sorted=False).indices
    chosen = groups.gather(2, nearest[:, None].expand(-1, whole // GROUPS, -1)).flatten(1)
    return torch.cat([chosen, distances[:, whole:]], 1).topk(count, dim=1, largest=False, sorted=False).values
