"""The training loop: one for every model, on one process or many, resumable at any moment.

Accelerate gives device placement, DDP and gradient accumulation. All randomness of a step comes from (seed, stage,
step, rank), so that a run that was killed goes on as if it had not been.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs, convert_outputs_to_fp32
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from smalti.core import distributed
from smalti.core.errors import UserError
from smalti.core.noise import mixed_seed
from smalti.core.stage import Context
from smalti.core.training.activations import checkpoint_activations
from smalti.core.training.checkpoint import load_state, own_state, save_state
from smalti.core.training.ema import EMA
from smalti.core.training.interruption import interruption
from smalti.core.training.optimizer import build_optimizer, set_rates
from smalti.core.training.options import Optimization
from smalti.core.training.sharding import (
    average_whole,
    clip,
    load_model,
    load_optimizer,
    shard,
    total_norm,
    whole,
)
from smalti.core.training.statistics import Statistics
from smalti.core.training.task import Batches, Task
from smalti.core.training.trackers import Trackers, check_installed


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
        The averaged weights of the first model, or None without averaging; with sharding, on the first process.

    Raises:
        UserError: a damaged checkpoint, too many updates in a row that are not finite, a batch that cannot be divided.
        KeyboardInterrupt: after Ctrl-C, when the state is saved.
    """
    return _Loop(task, batches, optimization, stage, context).run()


class _Loop:
    def __init__(self, task: Task, batches: Batches, optimization: Optimization, stage: str, context: Context) -> None:
        self.task, self.batches, self.optimization = task, batches, optimization
        self.stage, self.context = stage, context
        check_installed(optimization.trackers)
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
        self.main_name = next(iter(task.models))
        self.main = task.models[self.main_name]
        self.sharded = optimization.sharding == "full" and distributed.world_size() > 1
        self.models: dict[str, nn.Module] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.optimizations: dict[str, Optimization] = {}
        for name, model in task.models.items():
            model.train()
            own = self.optimizations[name] = task.optimization(name, optimization)
            self.models[name] = self._prepared(self._equipped(model))
            self.optimizers[name] = build_optimizer(model, own)
        # Of its own for each model: accelerate's would be shared by optimizers that step one after the other.
        half, device = optimization.precision == "float16", self.accelerator.device.type
        self.scalers = {name: GradScaler(device, enabled=half) for name in task.models}
        self.statistics = {name: Statistics(model) for name, model in task.models.items()}
        decay = optimization.ema_decay
        self.ema = EMA(self.main, decay, optimization.ema_warmup) if decay is not None else None
        self.trackers: Trackers | None = None
        self.step = 0
        self.sums: dict[str, float] = {}
        self.summed = 0
        self.skipped = 0  # since the last line
        self.skipped_in_a_row = 0

    def _equipped(self, model: nn.Module) -> nn.Module:
        """The model with what the options add to its forward pass."""
        if self.optimization.checkpoint_activations and model is self.main:
            checkpoint_activations(model)
        if self.optimization.compile:
            model.compile()
        if self.optimization.precision == "float16":
            model.forward = convert_outputs_to_fp32(model.forward)
        return model

    def _prepared(self, model: nn.Module) -> nn.Module:
        """The model on its device, for as many processes as there are."""
        if self.sharded and model is self.main:
            shard(model, self.accelerator.device, self.task.whole)
            return model
        prepared: nn.Module = self.accelerator.prepare(model)
        return prepared

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.optimization.precision == "float16":
            return torch.autocast(self.accelerator.device.type, torch.float16)
        context: AbstractContextManager[Any] = self.accelerator.autocast()
        return context

    def _own_step(self, name: str, step: int) -> int:
        return max(step - self.task.first_steps.get(name, 0), 0)

    def run(self) -> dict[str, Tensor] | None:
        self._load()
        if distributed.rank() == 0:
            self.context.run.rewind_metrics(self.stage, self.step)
            settings = self.optimization.model_dump(mode="json")
            self.trackers = Trackers(self.optimization.trackers, self.context.run, self.stage, self.step, settings)
        reporter, total = self.context.reporter, self.optimization.steps
        due = False
        with (
            interruption() as interrupted,
            reporter.progress(self.stage, total, self.step, "step") as advance,
        ):
            while self.step < total:
                self._update()
                self.step += 1
                advance(1, self._look())
                stopping = bool(interrupted) and distributed.world_size() == 1
                due = due or self.step % self.optimization.checkpoint_every == 0 or stopping
                # Among skipped updates nothing is saved: the last step before them may be what went wrong.
                if (due and not self.skipped_in_a_row) or self.step == total:
                    self._save()
                    due = False
                if stopping:
                    raise KeyboardInterrupt
        if self.trackers is not None:
            self.trackers.finish()
        for model in self.task.models.values():
            model.eval()
        return whole(self.ema.weights) if self.ema else None

    def _update(self) -> None:
        rank = distributed.rank()
        for name, optimizer in self.optimizers.items():
            set_rates(optimizer, self.optimizations[name], self._own_step(name, self.step))
            self.statistics[name].hold()
        before, self.task.loss_scale = self.task.state_dict(), self.scalers[self.main_name].get_scale()
        seen: list[dict[str, float]] = []
        stepped: set[str] = set()
        problem = None
        for part in range(self.optimization.accumulate):
            _seed(mixed_seed(self.context.recipe.seed, self.stage, self.step, part, rank), self.accelerator.device)
            batch = _moved(next(self.batches), self.accelerator.device)
            # One context for all models: each entry advances accelerate's shared counter, so a context per
            # model would let only the last one ever step.
            with self.accelerator.accumulate(*self.models.values()):
                problem = self._micro_step(batch, seen, stepped)
        main_stepped = problem is None or self.main_name in stepped
        if self.task.health is not None:
            self.task.health.keep(good=main_stepped)
        if self.ema is not None and main_stepped:
            self.ema.update()
        if problem is not None:
            self._skip(problem, before, stepped)
            return
        self.skipped_in_a_row = 0
        for values in seen:
            for name, value in values.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
        self.summed += self.optimization.accumulate

    def _micro_step(self, batch: Any, seen: list[dict[str, float]], stepped: set[str]) -> str | None:
        """Go through the objectives; what is wrong with one is told, and ends the update for all processes."""
        objectives = self.task.objectives(self.models, batch, self.step)
        while True:
            with self._autocast():
                item = next(objectives, None)
            if item is None:
                return None
            owners, losses = item
            names = (owners,) if isinstance(owners, str) else owners
            scaler = self.scalers[names[0]]
            self.accelerator.backward(scaler.scale(torch.stack([loss.float() for loss in losses.values()]).sum()))
            norms = self._gradient_norms(names, scaler) if self.accelerator.sync_gradients else {}
            values = torch.stack([value.detach().double() for value in (*losses.values(), *norms.values())]).tolist()
            seen.append(dict(zip(losses, values, strict=False)))
            if not self.accelerator.sync_gradients:
                continue
            problem = self._problem(seen, dict(zip(norms, values[len(losses) :], strict=True)))
            if problem is None:
                for name in names:
                    self.optimizers[name].step()
                    self.optimizers[name].zero_grad()
                stepped.update(names)
            if scaler.is_enabled():
                scaler.update()
            if problem is not None:
                return problem

    def _gradient_norms(self, names: tuple[str, ...], scaler: GradScaler) -> dict[str, Tensor]:
        """The norms of the models' gradients, which are clipped to what the options allow."""
        found = {}
        for name in names:
            weights = [weight for group in self.optimizers[name].param_groups for weight in group["params"]]
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            if self.sharded and name == self.main_name:
                average_whole(gradients)
            if not gradients:
                continue
            scaler.unscale_(self.optimizers[name])
            found[name] = total_norm(gradients)
            if self.optimization.clip is not None:
                clip(gradients, found[name], self.optimization.clip)
        return found

    def _problem(self, seen: list[dict[str, float]], norms: dict[str, float]) -> str | None:
        """What is not finite, on any process."""
        losses = [(name, value) for values in seen for name, value in values.items()]
        found = [f"the loss {name!r} is {value}" for name, value in losses if not math.isfinite(value)]
        found += [f"the gradient of {name!r} is {norm}" for name, norm in norms.items() if not math.isfinite(norm)]
        if distributed.world_size() == 1:
            return found[0] if found else None
        anywhere = distributed.all_reduce_sum(torch.tensor(len(found), device=self.accelerator.device))
        if not int(anywhere):
            return None
        sentences = [sentence for found in distributed.gather_objects(found) for sentence in found]
        # One loss spoils the gradients of all processes.
        return next((sentence for sentence in sentences if sentence.startswith("the loss")), sentences[0])

    def _skip(self, problem: str, before: dict[str, Any], stepped: set[str]) -> None:
        """Leave everything that has not stepped as it was before this update."""
        for name, optimizer in self.optimizers.items():
            optimizer.zero_grad()
            if name not in stepped:
                self.statistics[name].put_back()
        self.task.load_state_dict(before)
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row > self.optimization.max_skipped:
            kept = f"what {self._path} holds is kept" if self._path.exists() else "nothing was saved yet"
            before_it = self.skipped_in_a_row - 1
            which = "one update was" if before_it == 1 else f"{before_it} updates in a row were"
            times = f"{which} skipped, and then " if before_it else ""
            raise UserError(
                f"{self.stage}: {times}{problem} at step {self.step}; lower the learning rate or clip the gradient "
                f"({kept})"
            )
        # Under loss scaling gradients leave the range of float16 now and then; that is how the scale is found.
        if problem.startswith("the loss") or self.optimization.precision != "float16":
            self.context.reporter.say(f"{self.stage}: step {self.step} is skipped, {problem}")

    def _look(self) -> str | None:
        """Validate and tell what is due; a note for the progress bar."""
        validator = self.task.validator
        validating = validator is not None and validator.is_due(self.step)
        if not (validating or self.step % self.optimization.log_every == 0 or self.step == self.optimization.steps):
            return None
        findings: dict[str, Any] = {}
        if validator is not None and validating:
            findings["validation"] = validator(self.step, self.ema.weights if self.ema else None, self.trackers)
            self.main.train()
        return self._log(findings)

    def _log(self, findings: dict[str, Any]) -> str:
        parts = distributed.gather_objects((self.sums, self.summed))
        count = sum(summed for _, summed in parts)
        means = {name: sum(sums.get(name, 0.0) for sums, _ in parts) / count for name in self.sums}
        rate = self.optimizers[self.main_name].param_groups[0]["lr"]
        line: dict[str, Any] = {"stage": self.stage, "step": self.step, "learning_rate": rate, **means, **findings}
        if self.skipped:
            line["skipped"] = self.skipped
        self.sums, self.summed, self.skipped = {}, 0, 0
        if self.task.health is not None and count:
            line["codebook_health"] = self.task.health.findings()
            warning = self.task.health.warning(line["codebook_health"], self.stage, self.step)
            if warning is not None:
                self.context.reporter.say(warning)
        if self.trackers is not None:
            self.context.run.append_metrics(line)
            self.trackers.log(line)
        return ", ".join(f"{name} {value:.4g}" for name, value in means.items())

    def _save(self) -> None:
        own = {"batches": self.batches.state_dict(), "sums": self.sums, "summed": self.summed}
        if self.task.health is not None:
            own["health"] = self.task.health.state_dict()
        ranks = distributed.gather_objects(own)
        state = whole(
            {
                "step": self.step,
                "skipped": self.skipped,
                "models": {name: model.state_dict() for name, model in self.task.models.items()},
                "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
                "scalers": {name: scaler.state_dict() for name, scaler in self.scalers.items()},
                "ema": self.ema.state_dict() if self.ema else None,
                "task": self.task.state_dict(),
                "validator": self.task.validator.state_dict() if self.task.validator else None,
                "ranks": ranks,
            }
        )
        if distributed.rank() == 0:
            save_state(self._path, state)
        distributed.barrier()

    @property
    def _path(self) -> Path:
        return self.context.run.state / f"{self.stage}.pt"

    def _load(self) -> None:
        state = load_state(self._path)
        if state is None:
            return
        try:
            self._take(state)
        except UserError:
            raise
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            first = (str(error).splitlines() or ["empty"])[0][:200]
            raise UserError(
                f"the checkpoint {self._path} is not of this training ({type(error).__name__}: {first}); remove it to "
                "train from the start"
            ) from error

    def _take(self, state: dict[str, Any]) -> None:
        self.step, self.skipped = state["step"], state["skipped"]
        for name, model in self.task.models.items():
            load_model(model, state["models"][name])
            load_optimizer(self.optimizers[name], state["optimizers"][name])
            if self.scalers[name].is_enabled():
                self.scalers[name].load_state_dict(state["scalers"][name])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.task.load_state_dict(state["task"])
        if self.task.validator is not None:
            self.task.validator.load_state_dict(state["validator"])
        own = own_state(state["ranks"], distributed.rank(), distributed.world_size())
        self.batches.load_state_dict(own["batches"])
        self.sums, self.summed = own["sums"], own["summed"]
        if self.task.health is not None:
            self.task.health.load_state_dict(own["health"])


def _seed(seed: int, device: torch.device) -> None:
    """Seed the generators that a step uses; `torch.manual_seed` looks for all devices there are, a millisecond long."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _moved(batch: Any, device: torch.device) -> Any:
    """The batch, a named tuple, with its tensors on `device`."""
    moved = [item.to(device, non_blocking=True) if isinstance(item, Tensor) else item for item in batch]
    return type(batch)(*moved) if hasattr(batch, "_fields") else tuple(moved)
