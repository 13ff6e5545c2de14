"""Several streams of tokens in one row: one after the other at each position, with tables and outputs of their own.

Legend: B batch, L token positions, S streams, K codes of a stream, T = L S sub-tokens in a row, D width of the model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def embedded(tables: nn.ModuleList, tokens: Tensor) -> Tensor:
    """Tokens `(B, L, S)` to the embeddings `(B, T, D)` of their sub-tokens, by a table for each stream."""
    return torch.stack([table(tokens[:, :, stream]) for stream, table in enumerate(tables)], dim=2).flatten(1, 2)


def stream_logits(outputs: nn.ModuleList, hidden: Tensor) -> list[Tensor]:
    """What predicts the sub-tokens `(B, T, D)` to logits `(B, L, K)` float32 for each stream, by an output for each."""
    by_position = hidden.unflatten(1, (-1, len(outputs))).unbind(2)
    return [output(part).float() for output, part in zip(outputs, by_position, strict=True)]
