"""The training loop: one for every model, on one process or many, resumable at any moment.

Accelerate gives device placement, DDP, mixed precision and gradient accumulation. All randomness of a step
comes from (seed, stage, step, rank), so that a run that was killed goes on as if it had not been.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from smalti.core import distributed
from smalti.core.errors import UserError
from smalti.core.noise import mixed_seed
from smalti.core.stage import Context
from smalti.core.training.checkpoint import load_state, save_state
from smalti.core.training.ema import EMA
from smalti.core.training.optimizer import build_optimizer, set_rates
from smalti.core.training.options import Optimization
from smalti.core.training.schedule import multiplier
from smalti.core.training.token_health import TokenHealth

Objective = tuple[str | tuple[str, ...], dict[str, Tensor]]


class Batches(Protocol):
    """An endless stream of this process's batches that can tell and take its position."""

    def __next__(self) -> Any:
        """The next batch, a tuple with tensors."""

    def state_dict(self) -> dict[str, int]:
        """The position: which batch comes next."""

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a position."""


class Task(ABC):
    """What is trained.

    Attributes:
        models: networks by name, each with an optimizer of its own; the first is the one that is kept and
            averaged.
        learning_rates: for models whose rate is not the optimization's.
        first_steps: for models that begin to train later; their schedules begin there.
        health: of the tokens it sees, told beside the losses.
    """

    models: dict[str, nn.Module]
    learning_rates: Mapping[str, float] = {}
    first_steps: Mapping[str, int] = {}
    health: TokenHealth | None = None

    def optimization(self, name: str, shared: Optimization) -> Optimization:
        """How the model `name` is trained, where that is not how all are."""
        rate = self.learning_rates.get(name)
        return shared if rate is None else shared.model_copy(update={"learning_rate": rate})

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on beside the models, as tensors and plain data, equal on all processes."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        del state

    @abstractmethod
    def objectives(self, models: Mapping[str, nn.Module], batch: Any, step: int) -> Iterator[Objective]:
        """Yield, one after the other, whose optimizers step and the weighted terms they minimise.

        `models` are `self.models` as the loop wrapped them: call these. The next objective is asked for
        after the step of the one before.
        """


def micro_batch(optimization: Optimization) -> int:
    """Images that one process takes at once.

    Raises:
        UserError: the batch cannot be divided evenly.
    """
    parts = distributed.world_size() * optimization.accumulate
    if optimization.batch_size % parts:
        raise UserError(
            f"batch_size {optimization.batch_size} cannot be divided by {distributed.world_size()} processes "
            f"times {optimization.accumulate} micro-batches"
        )
    return optimization.batch_size // parts


def train(
    task: Task, batches: Batches, optimization: Optimization, *, stage: str, context: Context
) -> dict[str, Tensor] | None:
    """Train `task`'s models in place, from the stage's checkpoint if there is one.

    Args:
        task: models and objectives.
        batches: of `micro_batch(optimization)` images each.
        optimization: how.
        stage: names the checkpoint and the lines of `metrics.jsonl`.
        context: of the run.

    Returns:
        The averaged weights of the first model, or None without averaging.

    Raises:
        UserError: a damaged checkpoint, a loss that is not finite, a batch that cannot be divided.
        KeyboardInterrupt: after Ctrl-C, when the state is saved.
    """
    return _Loop(task, batches, optimization, stage, context).run()


class _Loop:
    def __init__(self, task: Task, batches: Batches, optimization: Optimization, stage: str, context: Context) -> None:
        self.task, self.batches, self.optimization = task, batches, optimization
        self.stage, self.context = stage, context
        # Accelerate keeps precision and accumulation for the whole process; stages of one run may differ.
        AcceleratorState._reset_state()
        GradientState._reset_state()
        self.accelerator = Accelerator(
            cpu=context.device == "cpu",
            mixed_precision="bf16" if optimization.precision == "bfloat16" else "no",
            gradient_accumulation_steps=optimization.accumulate,
            # Replicas start equal and quantizers reduce their own statistics; with buffer broadcasts a
            # discriminator could not see real and generated images in two passes of one step.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
        self.main = next(iter(task.models.values()))
        self.models: dict[str, nn.Module] = {}
        self.optimizers: dict[str, Any] = {}
        self.optimizations: dict[str, Optimization] = {}
        for name, model in task.models.items():
            model.train()
            own = self.optimizations[name] = task.optimization(name, optimization)
            self.models[name], self.optimizers[name] = self.accelerator.prepare(model, build_optimizer(model, own))
        decay = optimization.ema_decay
        self.ema = EMA(self.main, decay, optimization.ema_warmup) if decay is not None else None
        self.step = 0
        self.seconds = 0.0
        self.sums: dict[str, float] = {}
        self.summed = 0

    def _rate(self, name: str, step: int) -> float:
        optimization = self.optimizations[name]
        return optimization.learning_rate * multiplier(optimization, self._own_step(name, step))

    def _own_step(self, name: str, step: int) -> int:
        return max(step - self.task.first_steps.get(name, 0), 0)

    def run(self) -> dict[str, Tensor] | None:
        self._load()
        if distributed.rank() == 0:
            self.context.run.rewind_metrics(self.stage, self.step)
        reporter, total = self.context.reporter, self.optimization.steps
        started = time.monotonic() - self.seconds
        with (
            _interruption() as interrupted,
            reporter.progress(self.stage, total, self.step, "step") as advance,
        ):
            while self.step < total:
                self._update()
                self.step += 1
                self.seconds = time.monotonic() - started
                note = self._log() if self.step % self.optimization.log_every == 0 or self.step == total else None
                advance(1, note)
                stopping = bool(interrupted) and distributed.world_size() == 1
                if self.step % self.optimization.checkpoint_every == 0 or self.step == total or stopping:
                    self._save()
                if stopping:
                    raise KeyboardInterrupt
        for model in self.task.models.values():
            model.eval()
        return self.ema.weights if self.ema else None

    def _update(self) -> None:
        rank = distributed.rank()
        for name, optimizer in self.optimizers.items():
            set_rates(optimizer, self.optimizations[name], self._own_step(name, self.step))
        for part in range(self.optimization.accumulate):
            torch.manual_seed(mixed_seed(self.context.recipe.seed, self.stage, self.step, part, rank))
            batch = _moved(next(self.batches), self.accelerator.device)
            # One context for all models: each entry advances accelerate's shared counter, so a context per
            # model would let only the last one ever step.
            with self.accelerator.accumulate(*self.models.values()):
                self._micro_step(batch)
        if self.ema is not None:
            self.ema.update(self.main)

    def _micro_step(self, batch: Any) -> None:
        objectives = self.task.objectives(self.models, batch, self.step)
        while True:
            with self.accelerator.autocast():
                item = next(objectives, None)
            if item is None:
                break
            names, losses = item
            self.accelerator.backward(torch.stack([loss.float() for loss in losses.values()]).sum())
            for name in (names,) if isinstance(names, str) else names:
                if self.accelerator.sync_gradients and self.optimization.clip is not None:
                    self.accelerator.clip_grad_norm_(self.models[name].parameters(), self.optimization.clip)
                self.optimizers[name].step()
                self.optimizers[name].zero_grad()
            self._sum(losses)
        self.summed += 1

    def _sum(self, losses: dict[str, Tensor]) -> None:
        values = torch.stack([loss.detach().double() for loss in losses.values()]).tolist()
        for name, value in zip(losses, values, strict=True):
            if not math.isfinite(value):
                raise UserError(
                    f"{self.stage}: the loss {name!r} is {value} at step {self.step}; lower the learning rate or "
                    f"clip the gradient"
                )
            self.sums[name] = self.sums.get(name, 0.0) + value

    def _log(self) -> str:
        parts = distributed.gather_objects((self.sums, self.summed))
        count = sum(summed for _, summed in parts)
        means = {name: sum(sums.get(name, 0.0) for sums, _ in parts) / count for name in self.sums}
        self.sums, self.summed = {}, 0
        rate = self._rate(next(iter(self.models)), self.step - 1)
        line: dict[str, Any] = {"stage": self.stage, "step": self.step, "learning_rate": rate, **means}
        if self.task.health is not None:
            line["codebook_health"] = self.task.health.findings()
            warning = self.task.health.warning(line["codebook_health"], self.stage, self.step)
            if warning is not None:
                self.context.reporter.say(warning)
        if distributed.rank() == 0:
            self.context.run.append_metrics(line)
        return ", ".join(f"{name} {value:.4g}" for name, value in means.items())

    def _save(self) -> None:
        own = {"batches": self.batches.state_dict(), "sums": self.sums, "summed": self.summed}
        if self.task.health is not None:
            own["health"] = self.task.health.state_dict()
        ranks = distributed.gather_objects(own)
        if distributed.rank() == 0:
            state = {
                "step": self.step,
                "seconds": self.seconds,
                "models": {name: model.state_dict() for name, model in self.task.models.items()},
                "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
                "ema": self.ema.state_dict() if self.ema else None,
                "task": self.task.state_dict(),
                "ranks": ranks,
            }
            save_state(self._path, state)
        distributed.barrier()

    @property
    def _path(self) -> Any:
        return self.context.run.state / f"{self.stage}.pt"

    def _load(self) -> None:
        state = load_state(self._path)
        if state is None:
            return
        if len(state["ranks"]) != distributed.world_size():
            raise UserError(
                f"{self._path} was written by {len(state['ranks'])} processes, this is {distributed.world_size()}: "
                f"go on with as many, or remove it to train from the start"
            )
        self.step, self.seconds = state["step"], state["seconds"]
        for name, model in self.task.models.items():
            model.load_state_dict(state["models"][name])
            self.optimizers[name].load_state_dict(state["optimizers"][name])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.task.load_state_dict(state["task"])
        own = state["ranks"][distributed.rank()]
        self.batches.load_state_dict(own["batches"])
        self.sums, self.summed = own["sums"], own["summed"]
        if self.task.health is not None:
            self.task.health.load_state_dict(own["health"])


def _moved(batch: Any, device: torch.device) -> Any:
    """The batch, a named tuple, with its tensors on `device`."""
    moved = [item.to(device, non_blocking=True) if isinstance(item, Tensor) else item for item in batch]
    return type(batch)(*moved) if hasattr(batch, "_fields") else tuple(moved)


@contextmanager
def _interruption() -> Iterator[list[int]]:
    """Collect the first Ctrl-C instead of dying of it, so that the step can end and be saved."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = signal.getsignal(signal.SIGINT)

    def receive(number: int, _frame: object) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, receive)
    try:
        yield received
    finally:
        signal.signal(signal.SIGINT, before)
