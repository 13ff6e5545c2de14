"""Keys and values of positions already decoded, in memory allocated once.

Legend: B batch, T new positions, N positions so far, H heads, d width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from smalti.generation.huge_pages import USE, ask_for_huge_pages


class LayerCache:
    """Keys and values of one attention layer.

    Attributes:
        length: positions filled so far.
    """

    def __init__(
        self, batch: int, heads: int, capacity: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._keys = torch.empty(batch, heads, capacity, head_dim, dtype=dtype, device=device)
        self._values = torch.empty_like(self._keys)
        if device.type == "cpu":
            for part in (self._keys, self._values):
                ask_for_huge_pages(part.data_ptr(), part.nbytes, USE)
        self.length = 0

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store T new positions and give all N so far.

        Only the filled part is given, as views, so that attention never reads the rest.

        Args:
            key: `(B, H, T, d)`.
            value: `(B, H, T, d)`.

        Returns:
            Keys and values `(B, H, N, d)`, the new ones last.
        """
        start, end = self.length, self.length + key.shape[2]
        assert end <= self._keys.shape[2], f"the cache holds {self._keys.shape[2]} positions, {end} are too many"
        self._keys[:, :, start:end] = key
        self._values[:, :, start:end] = value
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]


class Cache:
    """The caches of all layers of a transformer.

    Under autocast they have its dtype: keys are stored as attention uses them.

    Args:
        layers: how many.
        batch: B.
        heads: H.
        capacity: the most positions they will hold.
        head_dim: d.
        weight: of the transformer; the caches lie beside it and have the dtype it computes in.
    """

    def __init__(self, layers: int, batch: int, heads: int, capacity: int, head_dim: int, weight: Tensor) -> None:
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        self.layers = [LayerCache(batch, heads, capacity, head_dim, dtype, weight.device) for _ in range(layers)]

    @property
    def length(self) -> int:
        """Positions filled so far."""
        return self.layers[0].length

    def clear(self) -> None:
        """Forget all positions; the memory stays."""
        for layer in self.layers:
            layer.length = 0
