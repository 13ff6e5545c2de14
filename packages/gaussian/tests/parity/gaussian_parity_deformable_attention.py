"""How the cases of deformable attention are run on ours: the core with its gradients, and the module."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from smalti.gaussian.attention.deformable import multi_scale_deformable_attention
from smalti.gaussian.attention.module import DeformableAttention

SIZES = {"shapes_hw", "batch", "heads", "head_dim", "queries", "points", "module"}
MODULE = {"d_model", "n_heads", "n_points", "points_with_fixed_centre"}


def deformable_attention(case: dict[str, Any], parity: ModuleType) -> dict[str, Tensor]:
    """The core in float64, the module in float32, with one level and with all."""
    config, module = case["config"], case["config"]["module"]
    assert config.keys() == SIZES, f"no runner understands the configuration {sorted(config)}"
    assert module.keys() == MODULE, f"no runner understands the module {sorted(module)}"
    assert module["points_with_fixed_centre"] == module["n_points"] + 1
    inputs = parity.fill_case_inputs(case)
    weights = parity.fill_state_dict(case["state_dict"], case["weight_seed"])
    shapes = [tuple(shape) for shape in config["shapes_hw"]]
    boxes = {"points": inputs["reference"].sigmoid()}
    boxes["boxes"] = torch.cat((boxes["points"], 0.1 + 0.3 * inputs["boxes"].sigmoid()), dim=-1)

    stages = _core(inputs, shapes)
    for name, its_shapes in (("single", shapes[:1]), ("multi", shapes)):
        attention = DeformableAttention(
            module["d_model"], heads=module["n_heads"], levels=len(its_shapes), points=module["n_points"]
        )
        prefix = f"{name}."
        attention.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
        source = inputs["source"][:, : sum(height * width for height, width in its_shapes)]
        for kind, references in boxes.items():
            stages[f"module.{name}.{kind}"] = attention(inputs["query"], references, source, its_shapes)
    return {name: value.detach() for name, value in stages.items()}


def _core(inputs: dict[str, Tensor], shapes: list[tuple[int, ...]]) -> dict[str, Tensor]:
    value, locations = inputs["value"].double(), 0.5 + 0.45 * inputs["locations"].double()
    weights = inputs["logits"].double().softmax(-1).view(locations.shape[:-1])
    leaves = [x.requires_grad_() for x in (value, locations, weights)]
    output = multi_scale_deformable_attention(leaves[0], shapes, *leaves[1:])
    gradients = torch.autograd.grad(output, leaves, inputs["upstream"].double())
    names = ("core.grad_value", "core.grad_locations", "core.grad_weights")
    return {"core.output": output, **dict(zip(names, gradients, strict=True))}


RUNNERS = {"gaussiantoken-op-deform-attn": deformable_attention}
