"""Batches of tokens without end, of images that are encoded as they are read.

Legend: B batch, L positions, S streams.
"""

from __future__ import annotations

from typing import Any, Self

import torch

from smalti.core.contracts import Tokenizer
from smalti.core.data.loader import TrainBatches
from smalti.core.data.token_batches import TokenBatch


class EncodedBatches:
    """What `TokenBatches` are, without tokens in memory or on disk.

    Args:
        images: batches of B images; they tell position and order.
        tokenizer: as it is used, on the device that encodes.
        at_once: images that are encoded together.
    """

    def __init__(self, images: TrainBatches, tokenizer: Tokenizer, at_once: int) -> None:
        self.images, self.tokenizer, self.at_once = images, tokenizer.eval(), at_once

    def __iter__(self) -> Self:
        return self

    @torch.no_grad()
    def __next__(self) -> TokenBatch:
        batch = next(self.images)
        device = next(self.tokenizer.parameters()).device
        parts = [self.tokenizer.encode(part.to(device)) for part in batch.images.split(self.at_once)]
        return TokenBatch(torch.cat(parts), batch.labels)

    def state_dict(self) -> dict[str, Any]:
        """Where this process is, as plain data, see `Position`."""
        return self.images.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where batches with the same arguments were."""
        self.images.load_state_dict(state)
