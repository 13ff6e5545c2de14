"""Steps per second of tokenizer training beside a plain PyTorch loop of the same model, in the same run.

The plain loop does what training is: forward, losses, backward, clipped gradient, fused AdamW, averaged weights. What
ours adds is its overhead: resumable randomness, schedules, skipping of updates that are not finite, codebook health,
sums for the log. Both take the same batches from memory; they take turns step by step, so that whatever else the
machine does slows both; a turn is a step of each.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparison import Comparison, Ours

from smalti.core.contracts import Tokenizer
from smalti.core.data.loader import Batch
from smalti.core.plugins import registry
from smalti.core.progress import Reporter
from smalti.core.run_folder import RunFolder
from smalti.core.training.loop import train
from smalti.core.training.options import TokenizerTraining
from smalti.core.training.tasks import TokenizerTask

pytestmark = pytest.mark.benchmark(group="Training")
STEPS, BATCH, SIZE = 120, 32, 32
MOST_OVERHEAD = 0.03
RATE, BETAS, DECAY = 1e-4, (0.9, 0.95), 0.999
IMAGES = Batch(
    torch.rand(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1,
    torch.zeros(BATCH, dtype=torch.int64),
    [""] * BATCH,
)


class Turns:
    """The same batch again and again; whenever it is asked for, the other loop makes a step first."""

    def __init__(self, other: Iterator[None]) -> None:
        self.other = other
        self.ours: list[float] = []
        self.plain: list[float] = []
        self.given: float | None = None

    def __next__(self) -> Batch:
        asked = time.process_time()
        if self.given is not None:
            self.ours.append(asked - self.given)
        next(self.other)
        self.given = time.process_time()
        self.plain.append(self.given - asked)
        return IMAGES

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Never called."""
        raise AssertionError("nothing goes on here")


def build() -> Tokenizer:
    torch.manual_seed(0)
    network = {"name": "cnn", "widths": [32, 64], "blocks": 1}
    content = {
        "preprocessing": {"image_size": SIZE, "channels": 3, "fit": "pad"},
        "encoder": network,
        "quantizer": {"name": "vq", "dim": 8, "codebook_size": 512},
        "decoder": network,
    }
    tokenizer: Tokenizer = registry().options("tokenizer", "composed").model_validate(content).build()
    return tokenizer


def ours(folder: Path, batches: Turns) -> None:
    options = TokenizerTraining.model_validate(
        {
            "steps": STEPS,
            "batch_size": BATCH,
            "learning_rate": RATE,
            "betas": BETAS,
            "ema_decay": DECAY,
            "log_every": STEPS,
            "checkpoint_every": STEPS,
            "losses": [{"name": "l2"}],
        }
    )
    run = RunFolder(folder)
    run.state.mkdir(parents=True)
    context: Any = SimpleNamespace(run=run, recipe=SimpleNamespace(seed=0), device="cpu", reporter=Reporter(quiet=True))
    train(TokenizerTask(build(), options), batches, options, stage="train", context=context)


def plain() -> Iterator[None]:
    """A step each time it is asked for another."""
    tokenizer = build().train()
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=RATE, betas=BETAS, weight_decay=0.0, fused=True)
    state = tokenizer.state_dict()
    averages = [tensor.clone() for tensor in state.values()]
    sums = 0.0
    images = IMAGES.images
    while True:
        output = tokenizer(images)
        loss = F.mse_loss(output.images, images) + torch.stack([*output.losses.values()]).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        optimizer.step()
        sums += loss.item()
        with torch.no_grad():
            floats = [(a, b) for a, b in zip(averages, state.values(), strict=True) if a.is_floating_point()]
            torch._foreach_lerp_([a for a, _ in floats], [b for _, b in floats], 1 - DECAY)
        yield


@pytest.fixture
def threads() -> int:
    return 1


@pytest.mark.slow
def test_overhead(compare: Comparison, tmp_path: Path) -> None:
    turns = Turns(plain())

    def run() -> None:
        ours(tmp_path / "run", turns)

    compare.benchmark.pedantic(run)
    work = Ours("a step of tokenizer training", run, bars={"plain loop": 1 / (1 + MOST_OVERHEAD)})
    compare.record(work, "plain loop", (turns.ours[2:], turns.plain[2 : len(turns.ours)]))  # the first allocate
