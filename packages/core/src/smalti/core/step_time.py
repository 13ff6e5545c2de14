"""How long an update of a tokenizer's weights takes, for several recipes in turns.

On a machine with other work the time of one run says little about another's. So all are timed in one process, a few
updates of each at a time, round after round.

Legend: B batch, C channels, H W pixels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from smalti.core.data.loader import Batch
from smalti.core.noise import mixed_seed
from smalti.core.progress import Reporter
from smalti.core.recipe import Recipe
from smalti.core.run_folder import RunFolder
from smalti.core.stage import Context
from smalti.core.training.freeze import freeze
from smalti.core.training.loop import micro_batch, train
from smalti.core.training.options import TokenizerTraining
from smalti.core.training.tasks import TokenizerTask

ROUNDS = 3
WARMUP, TIMED = 3, 6  # updates of a round
NEVER = 1 << 40
STAGE = "step-time"


@dataclass(frozen=True)
class StepTime:
    """The median over `updates` timed updates, in seconds; `clock` is `CPU time` or `wall clock`."""

    seconds: float
    updates: int
    clock: str


def step_times(recipes: Mapping[str, Recipe], device: str) -> dict[str, StepTime]:
    """Time the training loop on random images, without reading data, checkpoints and logs.

    All losses are on from the first update. One thread on a CPU is timed by the time it has the processor; everything
    else by the clock.

    Args:
        recipes: of tokenizers, by name.
        device: to train on.
    """
    alone = device == "cpu" and torch.get_num_threads() == 1
    now = time.process_time if alone else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in recipes}
    for _ in range(ROUNDS):
        for name, recipe in recipes.items():
            seconds[name] += _timed(recipe, device, now)
    clock = "CPU time" if alone else "wall clock"
    return {name: StepTime(median(found), len(found), clock) for name, found in seconds.items()}


def _timed(recipe: Recipe, device: str, now: Callable[[], float]) -> list[float]:
    """Seconds of each of `TIMED` updates."""
    assert recipe.tokenizer is not None
    assert recipe.train.tokenizer is not None
    options = _from_the_start(recipe.train.tokenizer)
    torch.manual_seed(mixed_seed(recipe.seed, STAGE, "weights"))
    tokenizer = recipe.tokenizer.build()
    freeze(tokenizer, options.freeze)
    size, channels = tokenizer.preprocessing.image_size, tokenizer.preprocessing.channels
    images = torch.rand(micro_batch(options), channels, size, size) * 2 - 1
    labels = torch.zeros(len(images), dtype=torch.int64)
    batches = _Clock(Batch(images, labels, [""] * len(images)), device, now)
    with TemporaryDirectory() as folder:
        context = Context(RunFolder(Path(folder)), recipe, device, Reporter(quiet=True))
        train(TokenizerTask(tokenizer, options), batches, options, stage=STAGE, context=context)
    begun = batches.times[WARMUP * options.accumulate :: options.accumulate]
    return [after - before for before, after in pairwise(begun)]


def _from_the_start(training: TokenizerTraining) -> TokenizerTraining:
    """The same training for a few updates: with all its losses, and nothing beside them."""
    adversarial = training.adversarial
    if adversarial is not None:
        adversarial = adversarial.model_copy(update={"start": 0, "discriminator_start": 0})
    return training.model_copy(
        update={
            "steps": WARMUP + TIMED + 1,
            "adversarial": adversarial,
            "checkpoint_every": NEVER,
            "log_every": NEVER,
            "trackers": (),
            "start": None,
            "validation": None,
        }
    )


class _Clock:
    """One batch without end; remembers when the loop asked for it."""

    def __init__(self, batch: Batch, device: str, now: Callable[[], float]) -> None:
        self.batch, self.device, self.now = batch, device, now
        self.times: list[float] = []

    def __next__(self) -> Batch:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        self.times.append(self.now())
        return self.batch

    def state_dict(self) -> dict[str, Any]:
        """Nothing: it has no position."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is no position to go to."""
        del state
