"""Keys and values of positions already decoded, in memory allocated once.

Legend: B batch, T new positions, N positions so far, H heads, d width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one attention layer.

    Attributes:
        length: positions filled so far.
    """

    def __init__(
        self, batch: int, capacity: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._keys = torch.empty(batch, capacity, heads, head_dim, dtype=dtype, device=device)
        self._values = torch.empty_like(self._keys)
        self.length = 0

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store T new positions and give all N so far.

        Only the filled part is given, as views, so that attention never reads the rest.

        Args:
            key: `(B, T, H, d)`.
            value: `(B, T, H, d)`.

        Returns:
            Keys and values `(B, N, H, d)`, the new ones last.
        """
        start, end = self.length, self.length + key.shape[1]
        assert end <= self._keys.shape[1], f"the cache holds {self._keys.shape[1]} positions, {end} are too many"
        self._keys[:, start:end] = key
        self._values[:, start:end] = value
        self.length = end
        return self._keys[:, :end], self._values[:, :end]


def allocate(layers: int, batch: int, capacity: int, heads: int, head_dim: int, weight: Tensor) -> list[LayerCache]:
    """Caches of `layers` layers for `capacity` positions, beside `weight` and in the dtype it computes in.

    Under autocast that is the autocast dtype: keys are stored as attention uses them.
    """
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return [LayerCache(batch, capacity, heads, head_dim, dtype, weight.device) for _ in range(layers)]
