"""What every `Generator.sample` does around its own loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from smalti.core.contracts import Generator
from smalti.core.sampling_settings import SamplingSettings
from smalti.generation.packing import packed_weights
from smalti.generation.sampling import TokenSampler


@contextmanager
def decoding(model: nn.Module, settings: SamplingSettings) -> Iterator[None]:
    """Evaluation mode without gradients and with packed weights; afterwards the model is as it was.

    Tensors made within are inference tensors: clone what leaves the block.
    """
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), packed_weights(model, settings.weights):
            yield
    finally:
        model.train(training)


def sample_one_by_one(
    model: Generator,
    decode: Callable[[Tensor, TokenSampler], Tensor],
    label_dropout: float,
    labels: Tensor,
    settings: SamplingSettings,
    indices: Tensor | None,
) -> Tensor:
    """`Generator.sample` of a model that draws one token after the other: tokens `(B, L, S)`.

    Args:
        model: that draws.
        decode: its loop over positions and streams: labels `(B, ...)` and the sampler to tokens `(B, L, S)`.
        label_dropout: with which it was trained.
        labels: as of `Generator.sample`, checked.
        settings: as of `Generator.sample`.
        indices: as of `Generator.sample`.

    Raises:
        UserError: as `TokenSampler.start`.
    """
    layout = model.token_layout
    sampler = TokenSampler.start(settings, labels, indices, layout.positions, layout.streams, label_dropout)
    with decoding(model, settings):
        tokens = decode(labels, sampler)
    # A tensor made in inference mode could not be trained on.
    return tokens.clone()
