"""What of a pretrained backbone is trained: everything, nothing, or low-rank adapters (LoRA, Hu et al. 2022)."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from smalti.core.backbones.pretrained import import_extra
from smalti.core.errors import UserError
from smalti.core.options import Options


class LoRAOptions(Options):
    """Options of the adapters.

    Args:
        rank: of the update of a layer's weight.
        alpha: the update is multiplied by `alpha / rank`.
        layers: endings of the names of the linear layers that get one, e.g. `mlp.fc1`; by default all that
            are trained with `full`.
    """

    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] = 8.0
    layers: tuple[str, ...] = ()


class TuningOptions(Options):
    """What of a backbone is trained.

    Args:
        tuning: `full`; `frozen`, nothing, and it stays in evaluation mode; `lora`, adapters only.
        lora: of the adapters.
    """

    tuning: Literal["full", "frozen", "lora"] = "full"
    lora: LoRAOptions = LoRAOptions()


def tune(backbone: nn.Module, options: TuningOptions) -> None:
    """Freeze `backbone`, which then stays in evaluation mode, or give it adapters, in place.

    Call it when the backbone is built and has its pretrained weights: optimizer and averaged weights are then made
    of what is trained. Adapters start as no change. They are part of the state dict, under peft's names.

    Raises:
        UserError: peft is not installed, no linear layer has such a name.
    """
    if options.tuning == "full":
        return
    trained = [
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad
    ]
    if options.tuning == "lora":
        backbone.requires_grad_(False)
        _add_adapters(backbone, trained, options.lora)
    else:
        keep_frozen(backbone)


def keep_frozen(module: nn.Module) -> None:
    """Take all weights of `module` out of training, in place, and keep it in evaluation mode from now on."""
    module.requires_grad_(False).eval()
    module.train = partial(_stay, module)  # type: ignore[method-assign]


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:  # as nn.Module.train has it
    del mode
    return module


def _add_adapters(backbone: nn.Module, layers: list[str], options: LoRAOptions) -> None:
    peft = import_extra("peft")
    endings = tuple(f".{ending}" for ending in options.layers)
    chosen = [name for name in layers if not endings or f".{name}".endswith(endings)]
    if not chosen:
        raise UserError(
            f"no linear layer of {type(backbone).__name__} has a name that ends in {', '.join(options.layers)}"
        )
    adapters = peft.LoraConfig(r=options.rank, lora_alpha=options.alpha, lora_dropout=0.0, target_modules=chosen)
    peft.inject_adapter_in_model(adapters, backbone)
