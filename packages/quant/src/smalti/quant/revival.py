"""Codes made of tokens: those of the first batch, and those that take the place of dead ones.

Both happen in operators of their own, since they look at values: torch.compile then keeps one graph.

Legend: N vectors of this process, K codes, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smalti.core.noise import mixed_seed
from smalti.quant.clusters import kmeans, shared_sample

KMEANS_ITERATIONS = 10


class Revival(nn.Module):
    """Counts for every code the training batches in a row without a token, and the batches.

    Its buffers make a resumed run count on and draw what the unbroken one would have drawn.

    Args:
        size: K.
    """

    step: Tensor
    unused: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("step", torch.tensor(0))
        self.register_buffer("unused", torch.zeros(size, dtype=torch.int64))

    @torch.no_grad()
    def note(self, counts: Tensor) -> None:
        """Take in a batch in which code k got `counts[k]` tokens, `(K,)`, of all processes."""
        self.unused.copy_(torch.where(counts > 0, 0, self.unused + 1))
        self.step += 1


@torch.library.custom_op("smalti::revive", mutates_args=("unused", "codebook", "counts", "sums"))
def revive(
    dead: Tensor,
    vectors: Tensor,
    step: Tensor,
    unused: Tensor,
    codebook: Tensor,
    counts: Tensor | None,
    sums: Tensor | None,
    seen: float,
) -> None:
    """Put random tokens in the place of codes, and let their statistics start again.

    Args:
        dead: bool `(K,)`, which codes.
        vectors: float `(N, D)`, the tokens, N at least 1.
        step: a number to draw by.
        unused: int64 `(K,)`, becomes 0.
        codebook: `(K, D)`.
        counts: moving counts `(K,)`, become `seen`, if there are any.
        sums: moving sums `(K, D)`.
        seen: how often the new codes count as seen.
    """
    rows = dead.nonzero().flatten()
    if len(rows):
        codes = shared_sample(vectors, len(rows), mixed_seed("vq", "revive", int(step)))
        unused[rows] = 0
        _place(rows, codes, codes.new_full((len(rows),), seen), codebook, counts, sums)


@torch.library.custom_op("smalti::initialise_by_data", mutates_args=("initialised", "codebook", "counts", "sums"))
def initialise_by_data(
    vectors: Tensor, initialised: Tensor, codebook: Tensor, counts: Tensor | None, sums: Tensor | None, cosine: bool
) -> None:
    """Unless `initialised` is true already, put the k-means of the tokens into the codebook.

    Args:
        vectors: float `(N, D)`, the tokens, N at least 1.
        initialised: bool `()`, becomes true.
        codebook: `(K, D)`.
        counts: moving counts `(K,)`, become the sizes of the clusters, if there are any.
        sums: moving sums `(K, D)`.
        cosine: the tokens are of unit length, and so are the means to be.
    """
    if not initialised:
        start = shared_sample(vectors, len(codebook), mixed_seed("vq", "initialise"))
        means, sizes = kmeans(vectors, start, KMEANS_ITERATIONS, cosine=cosine)
        rows = torch.arange(len(codebook), device=codebook.device)
        _place(rows, means, sizes.clamp(min=1), codebook, counts, sums)
        initialised.fill_(True)


@torch.no_grad()
def _place(
    rows: Tensor, codes: Tensor, seen: Tensor, codebook: Tensor, counts: Tensor | None, sums: Tensor | None
) -> None:
    # An optimizer with momentum still holds the averages of the old rows. They were decaying, since a
    # code that is not used has no gradient, and a revived row drifts by what is left of them.
    codebook[rows] = codes.to(codebook.dtype)
    if counts is not None and sums is not None:
        counts[rows] = seen.to(counts.dtype)
        sums[rows] = (seen[:, None] * codes).to(sums.dtype)
