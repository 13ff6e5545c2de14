"""What the runners of published models share: reading configurations, importing, and the forms that cases have."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from smalti.core.checkpoints.importing import configured, import_checkpoint, module_class, recognised, translated
from smalti.core.contracts import Tokenizer
from smalti.core.layout import TokenLayout
from smalti.core.plugins import registry

Stages = dict[str, Tensor]
Case = dict[str, Any]


def known(config: dict[str, Any], **defaults: Any) -> dict[str, Any]:
    """The configuration over defaults; a key that the runner does not know is an error."""
    unknown = config.keys() - defaults.keys()
    assert not unknown, f"options that the runner does not know: {sorted(unknown)}"
    return defaults | config


def override(path: str, value: Any) -> str:
    return f"{path}={json.dumps(value)}"


def imported(
    case: Case, parity: ModuleType, overrides: Sequence[str] = (), layout: str | None = None, *, ema: bool = True
) -> nn.Module:
    """The model of a case, by the import path."""
    weights = parity.fill_state_dict(case["state_dict"], case["weight_seed"])
    return import_checkpoint(weights, layout, overrides, ema=ema)


def check_layout(case: Case, overrides: Sequence[str] = (), name: str | None = None) -> nn.Module:
    """Build what the case's names and shapes configure, on the meta device; every entry must find its place.

    `name` is that of the layout, where it is not the one that is recognised.
    """
    with torch.device("meta"):
        entries = {
            name: torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
            for name, entry in case["state_dict"].items()
        }
        shapes = {name: tuple(tensor.shape) for name, tensor in entries.items()}
        layout = recognised(shapes) if name is None else registry().load("checkpoint", name)()
        selected = layout.select(entries, ema=True)
        config = configured(layout, {name: tuple(tensor.shape) for name, tensor in selected.items()}, overrides)
        module = module_class(config["kind"]).from_config(config)
        translated(layout, config, selected, module.state_dict(), case["name"])
    return module


def channel_first(latent: Tensor) -> Tensor:
    return latent.movedim(-1, 1)


def row(latent: Tensor) -> Tensor:
    """`(B, N, D)` as `(B, D, 1, N)`, the form in which 1-D tokenizers keep it."""
    return latent.transpose(1, 2).unsqueeze(2)


def unit(images: Tensor) -> Tensor:
    """Images in [-1, 1] as in [0, 1]."""
    return (images + 1) / 2


def pair(value: Tensor | float) -> Tensor:
    """Cases store a scalar followed by 0."""
    return torch.tensor([float(value), 0.0])


def watched(module: nn.Module, call: Callable[[], Any]) -> tuple[Tensor, Any]:
    """What `module` gives in the course of a call, and what the call gives."""
    found: list[Tensor] = []
    hook = module.register_forward_hook(lambda _module, _inputs, output: found.append(output))
    with torch.no_grad():
        result = call()
    hook.remove()
    (output,) = found
    return output, result


def preclamp(tokenizer: Tokenizer, tokens: Tensor, layout: TokenLayout | None = None) -> Tensor:
    """The images of which the public `decode` gives the clamped ones."""
    images, clamped = watched(tokenizer.decoder, lambda: tokenizer.decode(tokens, layout))
    assert torch.equal(images.clamp(-1, 1), clamped)
    return images


def phi_convolutions(config: dict[str, Any], scales: list[Any]) -> int:
    """How many there are by the configuration of VAR's tokenizer, or of XQ-GAN's."""
    return (config["share_quant_resi"] or len(scales)) if config["quant_resi"] else 0


def var_overrides(config: dict[str, Any], scales: list[Any]) -> list[str]:
    """What names and shapes of VAR's tokenizer do not tell."""
    last = scales[-1] if isinstance(scales[-1], int) else max(scales[-1])
    cosine, ratio = config["using_znorm"], config["quant_resi"]
    return [
        override("quantizer.scales", scales),
        override("quantizer.quantizer.cosine", cosine),
        override("quantizer.quantizer.unit_length", "search" if cosine else "all"),
        override("preprocessing.image_size", last * 2 ** (len(config["ch_mult"]) - 1)),
        *([override("quantizer.phi_ratio", abs(ratio))] if ratio else []),
    ]
