"""Checking a published layout without its weights: names and shapes on the meta device."""

from __future__ import annotations

import torch

from smalti.core.checkpoints.importing import configured, module_class, recognised, translated
from smalti.core.plugins import registry


def check_layout(case: dict, overrides: tuple[str, ...] = (), name: str | None = None) -> torch.nn.Module:
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
