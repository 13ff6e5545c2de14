"""Decoding with the cache along tokens that are given, to see the logits on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from smalti.core.contracts import Generator
from smalti.core.sampling_settings import SamplingSettings
from smalti.generation.decoding import decoding
from smalti.generation.sampling import TokenSampler


class Replay(TokenSampler):
    """Takes the given tokens `(B, L, S)` instead of drawing; keeps what it saw: `logits[stream][step]`, `(B, K)`."""

    def __init__(self, tokens: Tensor) -> None:
        streams = tokens.shape[2]
        super().__init__(SamplingSettings(), torch.arange(len(tokens)), tokens.shape[1], streams)
        self.tokens = tokens
        self.logits: list[list[Tensor]] = [[] for _ in range(streams)]

    def draw(self, logits: Tensor, step: int, stream: int = 0, progress: float | None = None) -> Tensor:
        self.logits[stream].append(logits.clone())
        return self.tokens[:, step, stream]


def cached_logits(model: Generator, tokens: Tensor, labels: Tensor) -> list[Tensor]:
    """For each stream `(B, L, K)`, as sampling computes them."""
    replay = Replay(tokens)
    with decoding(model, SamplingSettings()):
        model.decode(labels, replay)
    return [torch.stack(steps, dim=1) for steps in replay.logits]
