"""The optimizer of a model, and what changes in it from step to step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from smalti.core.training.options import Optimization
from smalti.core.training.schedule import multiplier, weight_decay


def build_optimizer(model: nn.Module, optimization: Optimization) -> torch.optim.Optimizer:
    """AdamW or Adam over the parameters that learn, in two groups: with weight decay and without."""
    learning = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    decayed = [weight for name, weight in learning if _decays(name, weight, optimization)]
    others = [weight for name, weight in learning if not _decays(name, weight, optimization)]
    groups = [{"params": decayed, "weight_decay": optimization.weight_decay}, {"params": others, "weight_decay": 0.0}]
    rate = optimization.learning_rate * multiplier(optimization, 0)
    kind = torch.optim.AdamW if optimization.optimizer == "adamw" else torch.optim.Adam
    # A fused step is one kernel per group: on small models the step is half the overhead. It cannot take sharded and
    # whole weights in one group.
    mixed = len({isinstance(weight, DTensor) for _, weight in learning}) > 1
    return kind(groups, lr=rate, betas=optimization.betas, fused=not mixed, foreach=False if mixed else None)


def set_rates(optimizer: Any, optimization: Optimization, step: int) -> None:
    """Learning rate and weight decay of update `step`, in an optimizer of `build_optimizer`, wrapped or not."""
    decayed, others = optimizer.param_groups
    decayed["lr"] = others["lr"] = optimization.learning_rate * multiplier(optimization, step)
    decayed["weight_decay"] = weight_decay(optimization, step)


def _decays(name: str, weight: nn.Parameter, optimization: Optimization) -> bool:
    if any(part in name for part in optimization.no_decay):
        return False
    return weight.ndim >= 2 or optimization.decay_vectors
