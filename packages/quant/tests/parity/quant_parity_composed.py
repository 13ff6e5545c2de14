"""How the cases of composed quantizers are run on ours: residual ones of all units, and those of the modules beside."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import torch
from quant_parity_lucid_vq import Stages, pair
from quant_parity_residual_vq import (
    Calls,
    grads,
    listed,
    load_projections,
    only,
    projected_unit,
    residual_vq,
    weights_of,
)
from quant_parity_scales import hierarchical, var_phi, xqgan
from torch import Tensor

from smalti.core.codebook_health import CodebookHealth
from smalti.core.contracts import Quantizer
from smalti.quant.fsq import FiniteScalarOptions
from smalti.quant.lfq import BinarySphericalOptions, LookupFreeOptions
from smalti.quant.residual import ResidualOptions
from smalti.quant.simvq import SimVQOptions
from smalti.quant.vector import VectorQuantizerOptions

# ---- quant-lucid-residual-{fsq, lfq, simvq}


def _evaluated(module: Quantizer, latent: Tensor) -> Stages:
    evaluated = module.eval()(latent)
    return {
        "eval_quantized": evaluated.latent,
        "eval_indices": evaluated.tokens,
        "decode": module.decode(evaluated.tokens, latent.shape[1:-1]),
    }


def residual_fsq(case: dict[str, Any], parity: ModuleType) -> Stages:
    config = only(dict(case["config"]), "params", "latent_scale", "decode", "table")
    params = only(
        dict(config["params"]), "levels", "dim", "num_quantizers", "bound_hard_clamp", "soft_clamp_input_value"
    )
    levels, hard = params["levels"], params.get("bound_hard_clamp", True)
    clamp = params.get("soft_clamp_input_value")
    if clamp is None and hard:
        clamp = [1 + 1 / (level - 1) for level in levels]
    unit = FiniteScalarOptions(levels=levels, symmetric=True, bound="clamp" if hard else "tanh")
    stack = ResidualOptions(
        quantizers=[unit],
        depth=params["num_quantizers"],
        gradient="levels",
        level_scale=[1 / level for level in levels],
        clamp=clamp,
    )
    module = projected_unit(params["dim"], len(levels), stack).build()
    parameters = load_projections(module, weights_of(case, parity), "") if params["dim"] != len(levels) else {}
    inputs = parity.fill_case_inputs(case)
    latent = (inputs["latent"] * config["latent_scale"]).requires_grad_()
    found = _evaluated(module, latent)
    (module.train()(latent).latent * inputs["probe"]).sum().backward()
    return found | {"grad_latent": latent.grad, **grads(parameters, case)}


def residual_lfq(case: dict[str, Any], parity: ModuleType) -> Stages:
    config = only(dict(case["config"]), "params", "table", "inv_temperature")
    params = only(
        dict(config["params"]),
        *("dim", "codebook_size", "num_quantizers", "soft_clamp_input_value", "entropy_loss_weight"),
        *("commitment_loss_weight", "diversity_gamma", "spherical"),
    )
    bits, depth = (params["codebook_size"] - 1).bit_length(), params["num_quantizers"]
    clamp = params.get("soft_clamp_input_value")
    unit = BinarySphericalOptions if params.get("spherical") else LookupFreeOptions
    units = [
        unit(
            bits=[bits],
            bit_order="msb",
            scale=2.0**-level,
            soft_clamp=clamp and clamp * 2.0**-level,
            commitment_weight=params.get("commitment_loss_weight", 0.0),
            entropy_weight=params.get("entropy_loss_weight", 0.1),
            batch_weight=params.get("diversity_gamma", 1.0),
            entropy_temperature=1 / config.get("inv_temperature", 100.0),
            entropy_floor="clamp",
        )
        for level in range(depth)
    ]
    module = projected_unit(params["dim"], bits, ResidualOptions(quantizers=units, gradient="levels")).build()
    projected = params["dim"] != bits
    parameters = load_projections(module, weights_of(case, parity), "") if projected else {}
    inputs = parity.fill_case_inputs(case)
    latent = inputs["latent"].requires_grad_()
    found = _evaluated(module, latent)
    calls = Calls(list((module.unit if projected else module).units))
    trained = module.train()(latent)
    losses = calls.losses()
    ((trained.latent * inputs["probe"]).sum() + sum(losses)).backward()
    return found | {
        "train_quantized": trained.latent,
        "loss": listed(losses),
        "grad_latent": latent.grad,
        **grads(parameters, case),
    }


def residual_simvq(case: dict[str, Any], parity: ModuleType) -> Stages:
    config = only(dict(case["config"]), "params")
    params = only(
        dict(config["params"]),
        *("dim", "num_quantizers", "codebook_size", "rotation_trick"),
        *("input_to_quantize_commit_loss_weight", "commitment_weight"),
    )
    weight = params.get("commitment_weight", 1.0)
    unit = SimVQOptions(
        dim=params["dim"],
        codebook_size=params["codebook_size"],
        estimator="rotation" if params.get("rotation_trick", True) else "straight-through",
        commitment_weight=weight * params.get("input_to_quantize_commit_loss_weight", 0.25),
        codebook_weight=weight,
    )
    module = ResidualOptions(quantizers=[unit], depth=params["num_quantizers"], gradient="levels").build()
    weights, parameters = weights_of(case, parity), {}
    with torch.no_grad():
        for level, simvq in enumerate(module.units):
            simvq.frozen.copy_(weights[f"layers.{level}.frozen_codebook"])
            simvq.transform.weight.copy_(weights[f"layers.{level}.code_transform.weight"])
            parameters[f"layers.{level}.code_transform.weight"] = simvq.transform.weight
    inputs = parity.fill_case_inputs(case)
    latent = inputs["latent"].requires_grad_()
    calls = Calls(list(module.units))
    trained = module.train()(latent)
    losses = calls.losses()
    ((trained.latent * inputs["probe"]).sum() + sum(losses)).backward()
    return {
        "quantized": trained.latent,
        "indices": trained.tokens,
        "loss": listed(losses),
        "grad_latent": latent.grad,
        "decode": module.decode(trained.tokens, latent.shape[1:-1]),
        **grads(parameters, case),
    }


# ---- quant-vistok-branch-residual


def branch_residual(case: dict[str, Any], parity: ModuleType) -> Stages:
    params = only(
        dict(only(dict(case["config"]), "params")["params"]), "depth", "codebook_num", "codebook_dim", "ema_decay"
    )
    unit = VectorQuantizerOptions(
        dim=params["codebook_dim"],
        codebook_size=params["codebook_num"],
        update="ema",
        ema_decay=params["ema_decay"],
        ema_smoothing=False,
        commitment_weight=1.0,
    )
    module = ResidualOptions(quantizers=[unit], depth=params["depth"], shared=True).build()
    weights, vq = weights_of(case, parity), module.units[0]
    with torch.no_grad():
        vq.codebook.copy_(weights["codebook.weight"])
        vq.learning.ema.counts.copy_(weights["ema_sumn"])
        vq.learning.ema.sums.copy_(weights["ema_sumz"])
    latent = parity.fill_case_inputs(case)["latent"].movedim(1, -1)
    space, depth = latent.shape[1:-1], params["depth"]
    tokens = module.eval()(latent).tokens
    prefixes = [module.decode(tokens[..., : level + 1], space).movedim(-1, 1) for level in range(depth)]
    health = CodebookHealth((params["codebook_num"],))
    health.update(tokens.view(len(tokens), -1, 1))
    # The branch takes the whole latent, where the residual belongs, into the sums of every level; ours does not.
    statistics, flat = copy.deepcopy(vq.learning.ema), latent.reshape(-1, latent.shape[-1])
    hits = statistics.update(tokens.flatten(0, 1).T.flatten(), flat.repeat(depth, 1))
    codebook = torch.where(hits[:, None] > 0, statistics.codebook(smoothing=False), vq.codebook)
    return {
        "indices": tokens.view(*latent.shape[:-1], depth),
        "prefix_sums": torch.stack(prefixes),
        "perplexity": pair(health.result()["perplexity"][0]),
        "commit": pair(module.train()(latent).losses["commitment"]),
        "codebook_after": codebook,
    }


RUNNERS = {
    "quant-lucid-rvq": residual_vq,
    "quant-lucid-grouped-rvq": residual_vq,
    "quant-lucid-residual-fsq": residual_fsq,
    "quant-lucid-residual-lfq": residual_lfq,
    "quant-lucid-residual-simvq": residual_simvq,
    "quant-lucid-hierarchical": hierarchical,
    "var-quantizer": var_phi,
    "xqgan-quantizers": xqgan,
    "quant-vistok-branch-residual": branch_residual,
}
