"""Runner of RobustTok's latent perturbation; its two random draws are inputs."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.core.training.perturbation import perturbed


def perturbation(case: dict[str, Any], parity: ModuleType) -> dict[str, Tensor]:
    assert case["config"].keys() == {"settings"}, case["config"]
    inputs = parity.fill_case_inputs(case)
    table = parity.fill_state_dict(case["state_dict"], case["weight_seed"])["embedding.weight"]
    latent, quantized = (inputs[name].movedim(1, -1) for name in ("latent", "quantized"))
    found = {}
    for name, given in case["config"]["settings"].items():
        setting = dict(given)
        codes = F.normalize(table, dim=-1) if setting.pop("codebook_norm") else table
        rank = inputs["choice"] % setting.pop("delta")
        rank = rank.masked_fill(inputs["uniform"] / 1000 > setting.pop("alpha"), 0)
        count = int(len(latent) * setting.pop("beta"))
        assert not setting, setting
        tokens = latent[:count, ..., 0].numel()
        new = perturbed(quantized[:count].flatten(0, -2), latent[:count].flatten(0, -2), codes, rank[:tokens])
        whole = torch.cat([new.view_as(quantized[:count]), quantized[count:]])
        found[name] = whole.movedim(-1, 1)
    return found


RUNNERS = {"xqgan-perturbation": perturbation}
