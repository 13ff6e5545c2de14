"""Runners of learning-rate schedules and averaged weights."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from smalti.core.training.ema import EMA, ema_decay
from smalti.core.training.options import Optimization
from smalti.core.training.schedule import multiplier, weight_decay

Stages = dict[str, Tensor]
Case = dict[str, Any]


def _optimization(**options: Any) -> Optimization:
    return Optimization.model_validate({"batch_size": 1, "learning_rate": 1.0, **options})


def _multipliers(optimization: Optimization, steps: list[int]) -> Tensor:
    return torch.tensor([multiplier(optimization, step) for step in steps], dtype=torch.float64)


def _averaged(start: Tensor, weights: list[Tensor], decay: float, warmup: str) -> Tensor:
    module = nn.Module()
    module.weight = nn.Parameter(start.clone())
    ema = EMA(module, decay, warmup)
    for weight in weights:
        with torch.no_grad():
            module.weight.copy_(weight)
        ema.update()
    return ema.weights["weight"]


def vistok(case: Case, parity: ModuleType) -> Stages:
    config = dict(case["config"])
    steps, updates = config.pop("steps"), config.pop("updates")
    assert not config, config
    # The multiplier is 0 at step 1000000 itself: that is the last of 1000001 updates.
    common = {"steps": 1_000_001, "warmup_steps": 10_000, "warmup_from": 0.0}
    start = parity.fill_case_inputs(case)["weight0"]
    found = {
        "constant_warmup": _multipliers(_optimization(**common, schedule="constant"), steps),
        "linear": _multipliers(_optimization(**common, schedule="linear"), steps),
        "cosine": _multipliers(_optimization(**common), steps),
        "cosine_min": _multipliers(_optimization(**common, final_ratio=1e-5), steps),
        "ema_after_5": _averaged(start, [start * (1 - 0.2 * s) for s in range(1, 6)], 0.9999, "power"),
    }
    for stage, warmup in (("none", "none"), ("tensorflow_like", "ramp"), ("crowsonkb", "power")):
        decays = [ema_decay(0.9999, warmup, update) for update in updates]
        found[f"ema_decay_{stage}"] = torch.tensor([*decays, 0.0], dtype=torch.float64)
    return found


def var(case: Case, parity: ModuleType) -> Stages:
    config = dict(case["config"])
    schedules, iterations = config.pop("schedules"), config.pop("iterations")
    peak, last = config.pop("peak_lr"), config.pop("wpe")
    common = {
        "steps": config.pop("max_iterations"),
        "warmup_steps": config.pop("warmup_iterations"),
        "warmup_from": config.pop("wp0"),
        "final_ratio": last,
        "learning_rate": peak,
        "weight_decay": config.pop("wd"),
        "final_weight_decay": config.pop("wd_end"),
    }
    assert not config, config

    def shape(name: str) -> dict[str, Any]:
        match name:
            case "cos":
                return {"schedule": "cosine"}
            case "lin":
                return {"schedule": "linear", "knots": [[0.15, 1.0]]}
            case "lin0":
                return {"schedule": "linear", "knots": [[0.05, 1.0]]}
            case "lin00":
                return {"schedule": "linear"}
            case "exp":
                return {"schedule": "exponential", "knots": [[0.15, 1.0]]}
        knee = float(name.removeprefix("lin"))
        return {"schedule": "linear", "knots": [[knee, (1 + last + (1 - last) * (1 - knee)) / 2]]}

    found = {}
    for name in schedules:
        optimization = _optimization(**{**common, **shape(name)})
        found[f"lr_{name}"] = peak * _multipliers(optimization, iterations)
        decays = [weight_decay(optimization, step) for step in iterations]
        found[f"wd_{name}"] = torch.tensor(decays, dtype=torch.float64)
    return found


RUNNERS = {"vistok-schedules-ema": vistok, "var-lr-schedules": var}
