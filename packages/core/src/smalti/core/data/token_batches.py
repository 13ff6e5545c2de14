"""Batches of tokens without end, from a set in memory.

Legend: B batch, N samples, V views, L positions, S streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smalti.core.data.position import Position, Shared
from smalti.core.data.token_shards import TokenSet
from smalti.core.errors import UserError
from smalti.core.noise import mixed_seed


class TokenBatch(NamedTuple):
    """`tokens` int64 `(B, L, S)`, `labels` int64 `(B,)`."""

    tokens: Tensor
    labels: Tensor


class TokenBatches:
    """Batches for one of several processes; state and sharing as for `TrainBatches`.

    Epoch e draws a permutation of the samples, and a view for each, from PCG64 seeded with
    `mixed_seed(seed, "tokens", e)`; the epochs one after the other are one stream, whose item g belongs to
    process `g % world_size`.

    Args:
        token_set: N samples.
        batch_size: B, of this process.
        seed: of permutations and views.
        rank: of this process.
        world_size: how many processes share the samples.

    Raises:
        UserError: there are fewer samples than processes.
    """

    def __init__(self, token_set: TokenSet, batch_size: int, seed: int, rank: int, world_size: int) -> None:
        if len(token_set) < world_size:
            raise UserError(f"{token_set.folder} holds {len(token_set)} samples, too few for {world_size} processes")
        self.token_set = token_set
        self.batch_size = batch_size
        self.seed = seed
        self.rank, self.world_size = rank, world_size
        self._position = Position()
        self._stream = self._items()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> TokenBatch:
        items: NDArray[np.int64] = np.array([next(self._stream) for _ in range(self.batch_size)])
        samples, views = items[:, 0], items[:, 1]
        tokens = self.token_set.tokens[samples, views].astype(np.int64)
        return TokenBatch(torch.from_numpy(tokens), torch.from_numpy(self.token_set.labels[samples]))

    def state_dict(self) -> dict[str, Any]:
        """Where this process is, as plain data, see `Position`."""
        return self._position._asdict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where batches with the same arguments were."""
        self._position = Position(**state)
        self._stream = self._items()

    def _items(self) -> Iterator[tuple[int, int]]:
        """Sample and view of each item of this process."""
        count, views = len(self.token_set), len(self.token_set.views)
        shared = Shared(self._position, self.rank, self.world_size)
        while True:
            generator = np.random.Generator(np.random.PCG64(mixed_seed(self.seed, "tokens", shared.epoch)))
            order, chosen = generator.permutation(count), generator.integers(views, size=count)
            for place in range(shared.start(), count, self.world_size):
                if not shared.is_consumed(place):
                    self._position = shared.after(place)
                    yield int(order[place]), int(chosen[place])
            shared.next_epoch(count)
