"""How the classifier of an evaluation is trained: cross-entropy on slightly moved and mirrored images.

Legend: B batch, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from smalti.core.data.images import to_uint8
from smalti.core.training.options import Beta, Optimization
from smalti.core.training.task import Objective, Task
from smalti.eval.classifier import Classifier

NAME = "classifier"


class ClassifierTraining(Optimization):
    """The classifier and its training; the defaults suit some thousand small images.

    Args:
        width: channels of the first level of the network.
        dropout: share of the pooled features that training drops.
        label_smoothing: probability that the target spreads evenly over all classes.
        shift: largest move in pixels of a training image, in each direction; the edge is repeated.
        flip: mirror half of the training images.
    """

    steps: Annotated[int, Field(ge=1)] = 2200
    batch_size: Annotated[int, Field(ge=1)] = 64
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    betas: tuple[Beta, Beta] = (0.9, 0.99)
    weight_decay: Annotated[float, Field(ge=0)] = 0.02
    warmup_steps: Annotated[int, Field(ge=0)] = 40
    clip: Annotated[float, Field(gt=0)] | None = None
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    checkpoint_every: Annotated[int, Field(ge=1)] = 500
    width: Annotated[int, Field(ge=4)] = 24
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.3
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.05
    shift: Annotated[int, Field(ge=0)] = 1
    flip: bool = True


class ClassifierTask(Task):
    """One classifier, one cross-entropy."""

    def __init__(self, classifier: Classifier, options: ClassifierTraining) -> None:
        self.models = {NAME: classifier}
        self.options = options

    def objectives(self, models: Mapping[str, nn.Module], batch: Any, step: int) -> Iterator[Objective]:
        """The loss of one batch of `images` `(B, C, H, W)` and `labels` `(B,)`."""
        images = augmented(to_uint8(batch.images), self.options.shift, flip=self.options.flip)
        logits = models[NAME](images)["logits"]
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=self.options.label_smoothing)
        yield NAME, {"cross_entropy": loss}


def augmented(images: Tensor, shift: int, *, flip: bool) -> Tensor:
    """Images `(B, H, W, 3)`, each moved by up to `shift` pixels and perhaps mirrored, by the global generator."""
    count, height, width, _ = images.shape
    device = images.device
    moves = torch.randint(-shift, shift + 1, (2, count, 1), device=device)
    rows = (torch.arange(height, device=device) + moves[0]).clamp(0, height - 1)
    columns = (torch.arange(width, device=device) + moves[1]).clamp(0, width - 1)
    if flip:
        mirrored = torch.rand(count, 1, device=device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    return images[torch.arange(count, device=device)[:, None, None], rows[:, :, None], columns[:, None, :]]
