"""Activation checkpointing: blocks compute their activations again in the backward pass (Chen et al. 2016)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from smalti.core.contracts import Quantizer
from smalti.core.errors import UserError


def checkpoint_activations(model: nn.Module) -> int:
    """Let every block of `model` keep only its input, in place; names and values stay as they are.

    A block is the outermost module with weights in a list or sequence of modules. Quantizers, and blocks with batch
    normalisation, are left out: computed twice they would count twice in their statistics.

    Returns:
        How many blocks there are.

    Raises:
        UserError: there is none.
    """
    found = [*blocks(model)]
    if not found:
        raise UserError(f"checkpoint_activations: {type(model).__name__} has no list of blocks to compute again")
    for block in found:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return len(found)


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules with weights in lists or sequences, but for quantizers and batch normalisation."""
    for child in module.children():
        if isinstance(child, Quantizer):
            continue
        repeats = isinstance(module, nn.ModuleList | nn.Sequential)
        if repeats and _is_block(child):
            yield child
        else:
            yield from blocks(child)


def _is_block(module: nn.Module) -> bool:
    if type(module).forward is nn.Module.forward or next(module.parameters(), None) is None:
        return False
    return not any(isinstance(part, Quantizer | _BatchNorm) for part in module.modules())
