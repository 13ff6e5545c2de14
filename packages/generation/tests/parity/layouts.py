"""Importing a case: its weights where it has outputs, else its names and shapes on the meta device."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from smalti.core.checkpoints.importing import configured, import_checkpoint, module_class, recognised, translated
from smalti.core.contracts import Generator


def imported(case: dict[str, Any], parity: ModuleType, name: str, overrides: list[str]) -> Generator:
    """The generator of a case, by the import path; its layout must be recognised as `name`."""
    if case["outputs"]:
        weights = parity.fill_state_dict(case["state_dict"], case["weight_seed"])
        assert recognised({key: tuple(tensor.shape) for key, tensor in weights.items()}).name == name
        return import_checkpoint(weights, overrides=overrides)
    with torch.device("meta"):
        entries = {
            key: torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
            for key, entry in case["state_dict"].items()
        }
        layout = recognised({key: tuple(tensor.shape) for key, tensor in entries.items()})
        assert layout.name == name
        selected = layout.select(entries, ema=True)
        config = configured(layout, {key: tuple(tensor.shape) for key, tensor in selected.items()}, overrides)
        module = module_class(config["kind"]).from_config(config)
        translated(layout, config, selected, module.state_dict(), case["name"])
    return module
