"""What every `Generator.sample` does around its own loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from smalti.core.sampling_settings import SamplingSettings
from smalti.generation.packing import packed_weights


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
