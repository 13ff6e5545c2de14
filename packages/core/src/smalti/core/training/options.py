"""Options of training; imported by recipes, so without torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from smalti.core.options import DiscriminatorOptions, LossOptions, Options, Slot


class Optimization(Options):
    """How a model is trained.

    Args:
        steps: updates of the weights.
        batch_size: images of one update over all processes and micro-batches.
        accumulate: micro-batches of one update.
        learning_rate: after warm-up (AdamW).
        betas: of AdamW.
        weight_decay: of AdamW, on weights of two axes or more.
        warmup_steps: linear from 0.
        schedule: after warm-up, cosine down to `final_ratio` times the learning rate, or constant.
        final_ratio: see `schedule`.
        clip: largest norm of the gradient; None for no limit.
        ema_decay: of the averaged weights, min(decay, (1 + n) / (10 + n)) after n updates; None for none.
        precision: of the forward pass; weights stay float32.
        checkpoint_every: updates between checkpoints of everything that is needed to go on.
        log_every: updates between lines of `metrics.jsonl`.
    """

    steps: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    accumulate: Annotated[int, Field(ge=1)] = 1
    learning_rate: Annotated[float, Field(gt=0)]
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["cosine", "constant"] = "cosine"
    final_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = 0.999
    precision: Literal["float32", "bfloat16"] = "float32"
    checkpoint_every: Annotated[int, Field(ge=1)] = 1000
    log_every: Annotated[int, Field(ge=1)] = 50


class Adversarial(Options):
    """The adversarial term of tokenizer training (hinge loss, Lim and Ye 2017).

    Args:
        discriminator: the network; it trains from the first update on.
        weight: of the generator's term.
        start: update at which the generator's term sets in.
        learning_rate: of the discriminator.
    """

    discriminator: Annotated[DiscriminatorOptions, Slot("discriminator")]
    weight: Annotated[float, Field(gt=0)] = 0.1
    start: Annotated[int, Field(ge=0)] = 0
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4


class TokenizerTraining(Optimization):
    """How a tokenizer is trained: with `losses` between reconstruction and image, and perhaps adversarially."""

    losses: Annotated[tuple[Annotated[LossOptions, Slot("loss")], ...], Field(min_length=1)]
    adversarial: Adversarial | None = None


class GeneratorTraining(Optimization):
    """How a generator is trained; its loss is its own."""
