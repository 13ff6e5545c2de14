"""How the cases of GaussianToken's schedules and figures are run on ours."""

from __future__ import annotations

import math
import re
from types import ModuleType
from typing import Any

import torch
from published_parts import known
from torch import Tensor, nn

from smalti.core.training.ema import EMA
from smalti.core.training.options import Optimization
from smalti.core.training.schedule import multiplier
from smalti.gaussian.gaussiantoken.falling_bound import FallingBound

Stages = dict[str, Tensor]
Case = dict[str, Any]


def schedules(case: Case, parity: ModuleType) -> Stages:
    """Learning rate, averaged weights, and the largest scale of Gaussians."""
    config = known(
        case["config"],
        lr=2e-4,
        warmup_lr=1e-6,
        min_lr=0.0,
        warmup_epochs=1,
        num_epochs=30,
        updates_per_epoch=None,
        range={},
        ema_decay=0.999,
    )
    peak, per_epoch = config["lr"], config["updates_per_epoch"]
    optimization = Optimization(
        batch_size=1,
        learning_rate=peak,
        steps=config["num_epochs"] * per_epoch + 1,
        warmup_steps=config["warmup_epochs"] * per_epoch,
        warmup_from=config["warmup_lr"] / peak,
        final_ratio=config["min_lr"] / peak,
        schedule_under_warmup=True,
    )
    updates = [int(number) for number in re.findall(r"\d+", re.findall(r"\[(.*?)\]", case["stages"]["lr"])[0])]
    rates = [peak * multiplier(optimization, update) for update in updates]
    inputs = parity.fill_case_inputs(case)
    start, *weights = (inputs[f"w{number}"] for number in range(len(inputs)))
    finals = [float(number) for number in re.findall(r"row \d final \[0.1,(.*?)\]", case["stages"]["range"])]
    return {
        "lr": torch.tensor(rates, dtype=torch.float64),
        "ema_change": _averaged(start, weights, config["ema_decay"]) - start,
        "range": torch.stack([_bounds(final, config["range"]) for final in finals]),
    }


def _averaged(start: Tensor, weights: list[Tensor], decay: float) -> Tensor:
    module = nn.Module()
    module.weight = nn.Parameter(start.clone())
    ema = EMA(module, decay, "none")
    for weight in weights:
        with torch.no_grad():
            module.weight.copy_(weight)
        ema.update()
    return ema.weights["weight"]


def _bounds(final: float, config: dict[str, float]) -> Tensor:
    limits = known(config, decay_rate=1e-3, ema_alpha=0.01, min_delta=0.01)
    bound = FallingBound(
        4.0, final, lowest=0.1, rate=limits["decay_rate"], step=limits["min_delta"], share=limits["ema_alpha"]
    )
    found = []
    for update in range(1000):
        bound.update(torch.tensor(2.0 + 1.8 * math.sin(update / 60)))
        if update % 50 == 49:
            found.append(bound.bound.clone())
    return torch.stack(found)


RUNNERS = {"gaussiantoken-schedules": schedules}
