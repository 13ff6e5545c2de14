"""How the cases of residual and grouped residual vector quantization are run on ours."""

from __future__ import annotations

import math
import random
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from quant_parity_lucid_vq import Stages
from torch import Tensor, nn

from smalti.core.contracts import Quantizer
from smalti.core.options import QuantizerOptions
from smalti.quant.product import ProductOptions
from smalti.quant.projected import ProjectedOptions
from smalti.quant.qinco import ImplicitCodebooksOptions
from smalti.quant.residual import Residual, ResidualOptions
from smalti.quant.vector import VectorQuantizerOptions


def only(found: dict[str, Any], *known: str) -> dict[str, Any]:
    unknown = set(found) - set(known)
    if unknown:
        raise ValueError(f"the runner does not know {', '.join(sorted(unknown))}")
    return found


def listed(values: list[Tensor | float]) -> Tensor:
    """Cases store scalars followed by 0."""
    return torch.stack([*(torch.as_tensor(value).detach() for value in values), torch.zeros(())])


def weights_of(case: dict[str, Any], parity: ModuleType) -> dict[str, Tensor]:
    return parity.fill_state_dict(case["state_dict"], case["weight_seed"])


def grads(parameters: dict[str, Tensor], case: dict[str, Any]) -> Stages:
    """Gradients of our parameters under the names of the original's."""
    return {
        f"grad_{key.replace('.', '_')}": tensor.grad.view(case["state_dict"][key]["shape"])
        for key, tensor in parameters.items()
        if tensor.grad is not None
    }


# ---- units of vector-quantize-pytorch: VectorQuantize's keywords, and its state


def vq_options(params: dict[str, Any], dim: int, size: int) -> VectorQuantizerOptions:
    only(
        params,
        *("decay", "commitment_weight", "rotation_trick", "use_cosine_sim", "threshold_ema_dead_code", "kmeans_init"),
        *("eps", "learnable_codebook", "ema_update"),
    )
    assert params.get("eps", 1e-5) == 1e-5
    learnable, weight = params.get("learnable_codebook", False), params.get("commitment_weight", 1.0)
    assert params.get("ema_update", True) != learnable
    return VectorQuantizerOptions(
        dim=dim,
        codebook_size=size,
        update="loss" if learnable else "ema",
        ema_decay=params.get("decay", 0.8),
        commitment_weight=weight,
        codebook_weight=weight,
        estimator="rotation" if params.get("rotation_trick", dim > 1) else "straight-through",
        cosine=params.get("use_cosine_sim", False),
        revive_below=params.get("threshold_ema_dead_code", 0) or None,
    )


def load_vq(unit: Quantizer, weights: dict[str, Tensor], prefix: str, head: int = 0) -> None:
    """Fill a unit from `{prefix}_codebook.*`; cosine codebooks are scaled to unit length, as the cases do."""
    assert bool(weights[f"{prefix}_codebook.initted"])
    codebook = weights[f"{prefix}_codebook.embed"][head]
    if unit.options.cosine:
        codebook = codebook / codebook.norm(dim=1, keepdim=True)
    with torch.no_grad():
        unit.codebook.copy_(codebook)
        if unit.options.update == "ema":
            unit.learning.ema.counts.copy_(weights[f"{prefix}_codebook.cluster_size"][head])
            unit.learning.ema.sums.copy_(weights[f"{prefix}_codebook.embed_avg"][head])


def load_projections(module: nn.Module, weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Fill `Projected` from `{prefix}project_in`, `{prefix}project_out`; its parameters by original key."""
    inner = f"{prefix}project_in.0" if f"{prefix}project_in.0.weight" in weights else f"{prefix}project_in"
    parts = {inner: module.project_in, f"{prefix}project_out": module.project_out}
    if module.layer_norm is not None:
        parts[f"{prefix}project_in.1"] = module.layer_norm
    return load_linear(parts, weights)


def load_linear(parts: dict[str, nn.Module], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fill modules from the weights under their keys; their parameters by original key."""
    found = {}
    for key, part in parts.items():
        for name, parameter in part.named_parameters():
            with torch.no_grad():
                parameter.copy_(weights[f"{key}.{name}"])
            found[f"{key}.{name}"] = parameter
    return found


def projected_unit(dim: int, inner: int, unit: QuantizerOptions, **options: Any) -> QuantizerOptions:
    return unit if inner == dim else ProjectedOptions(dim=dim, quantizer=unit, **options)


# ---- quant-lucid-rvq*, quant-lucid-grouped-rvq


class Calls:
    """What units gave, in the order of calls."""

    def __init__(self, units: list[nn.Module]) -> None:
        self.results: list[Any] = []
        for unit in {id(unit): unit for unit in units}.values():
            unit.register_forward_hook(lambda module, inputs, output: self.results.append(output))

    def losses(self) -> list[Tensor]:
        return [sum(result.losses.values(), torch.zeros(())) for result in self.results]

    def commitments(self) -> list[Tensor]:
        return [result.losses.get("commitment", torch.zeros(())) for result in self.results]


def _first_levels(params: dict[str, Any], depth: int, seed: int) -> int:
    """How many levels the original's draw keeps."""
    last = random.Random(seed).randrange(params.get("quantize_dropout_cutoff_index", 0), depth)
    multiple = params.get("quantize_dropout_multiple_of", 1)
    return math.ceil((last + 1) / multiple) * multiple


def qinco(case: dict[str, Any], parity: ModuleType) -> Stages:
    config = only(dict(case["config"]), "class", "params", "coarse", "dropout_seed", "latent_scale")
    params = only(
        dict(config["params"]),
        *("dim", "num_quantizers", "codebook_size", "implicit_neural_codebook", "mlp_kwargs"),
        *("commitment_weight", "rotation_trick"),
    )
    network = only(dict(params.get("mlp_kwargs", {})), "dim_hidden", "depth")
    depth, weight = params["num_quantizers"], params.get("commitment_weight", 1.0)
    module = ImplicitCodebooksOptions(
        dim=params["dim"],
        codebook_size=params["codebook_size"],
        depth=depth,
        hidden=network.get("dim_hidden"),
        blocks=network.get("depth", 4),
        gradient="levels",
        estimator="rotation" if params.get("rotation_trick", True) else "straight-through",
        commitment_weight=weight,
        codebook_weight=weight,
    ).build()
    weights, parameters = weights_of(case, parity), {}
    with torch.no_grad():
        for level in range(depth):
            module.codebooks[level] = weights[f"layers.{level}._codebook.embed"][0]
    for number, own in enumerate(module.networks):
        parts = {f"mlps.{number}.proj_in": own.project}
        for block, layers in enumerate(own.blocks):
            parts |= {f"mlps.{number}.layers.{block}.{layer}": layers[layer] for layer in (0, 2)}
        parameters |= load_linear(parts, weights)
    inputs = parity.fill_case_inputs(case)
    latent = (inputs["latent"] * config["latent_scale"]).requires_grad_()
    space = latent.shape[1:-1]
    evaluated = module.eval()(latent)
    sums = torch.stack([module.decode(evaluated.tokens[..., : level + 1], space) for level in range(depth)])
    found = {
        "eval_quantized": evaluated.latent,
        "eval_indices": evaluated.tokens,
        "eval_codes": torch.cat([sums[:1], sums.diff(dim=0)]),
        "decode": module.decode(evaluated.tokens, space),
    }
    if config["coarse"] is not None:
        found["decode_coarse"] = sums[config["coarse"] - 1]
    with patch("smalti.quant.qinco.summed", lambda terms: dict(enumerate(terms))):
        trained = module.train()(latent)
    total = sum(loss for terms in trained.losses.values() for loss in terms.values())
    ((trained.latent * inputs["probe"]).sum() + total).backward()
    return found | {
        "train_quantized": trained.latent,
        "train_indices": trained.tokens,
        # One term there, with the gradients of both.
        "train_losses": listed([terms["commitment"] for terms in trained.losses.values()]),
        "grad_latent": latent.grad,
        "embeds_after1": module.codebooks[:, None],
        **{f"grad_layers_{level}__codebook_embed": module.codebooks.grad[level, None] for level in range(depth)},
        **grads(parameters, case),
    }


def residual_vq(case: dict[str, Any], parity: ModuleType) -> Stages:
    if case["config"]["params"].get("implicit_neural_codebook"):
        return qinco(case, parity)
    config = only(dict(case["config"]), "class", "params", "coarse", "dropout_seed", "latent_scale")
    params, kind = dict(config["params"]), config["class"]
    assert kind in ("ResidualVQ", "GroupedResidualVQ")
    groups = params.pop("groups", 1)
    dim = params.pop("dim") // groups
    inner = params.pop("codebook_dim", dim)
    sizes = params.pop("codebook_size")
    depth = params.pop("num_quantizers", len(sizes) if isinstance(sizes, list) else None)
    sizes = sizes if isinstance(sizes, list) else [sizes] * depth
    shared = params.pop("shared_codebook", False)
    dropout = {key: params.pop(key) for key in list(params) if key.startswith("quantize_dropout")}
    only(dropout, "quantize_dropout", "quantize_dropout_cutoff_index", "quantize_dropout_multiple_of")
    fraction, beams = params.pop("quant_grad_frac", 0.0), params.pop("beam_size", None) or 1
    eval_beams, by_diveq = params.pop("eval_beam_size", None), params.pop("diveq", False)
    if by_diveq:
        # It turns the levels' losses and averages off.
        params |= {"learnable_codebook": True, "ema_update": False, "commitment_weight": 0.0}
    units = [vq_options(params, inner, size) for size in sizes]
    stack = ResidualOptions(
        quantizers=units[:1] if shared else units,
        depth=depth if shared else 1,
        shared=shared,
        gradient="diveq" if by_diveq else "levels",
        diveq_variance=0.0,  # a case of drawn noise would have no one answer
        quant_grad_frac=fraction,
        beams=beams,
        eval_beams=eval_beams,
        dropout_from=1 + dropout.get("quantize_dropout_cutoff_index", 0) if dropout.get("quantize_dropout") else None,
        dropout_multiple=dropout.get("quantize_dropout_multiple_of", 1),
    )
    branch = projected_unit(dim, inner, stack)
    module = ProductOptions(quantizers=[branch], branches=groups).build()

    weights, parameters = weights_of(case, parity), {}
    residuals: list[Residual] = []
    for group, unit in enumerate(module.units):
        prefix = f"rvqs.{group}." if kind == "GroupedResidualVQ" else ""
        residuals.append(unit if isinstance(unit, Residual) else unit.unit)
        if not isinstance(unit, Residual):
            parameters |= load_projections(unit, weights, prefix)
        # A shared codebook is stored once per level; the last one loaded stays.
        for level, vq in enumerate(residuals[-1].units.row()):
            load_vq(vq, weights, f"{prefix}layers.{level}.")
            if vq.options.update == "loss":
                parameters[f"{prefix}layers.{level}._codebook.embed"] = vq.codebook

    inputs = parity.fill_case_inputs(case)
    latent = (inputs["latent"] * config["latent_scale"]).requires_grad_()
    space = latent.shape[1:-1]

    def shaped(tokens: Tensor) -> Tensor:
        split = torch.stack(tokens.split(depth, -1))
        return split if kind == "GroupedResidualVQ" else split[0]

    evaluated = module.eval()(latent)
    codes = [
        [unit.decode(tokens[..., None], space) for unit, tokens in zip(stack.units.row(), part.unbind(-1), strict=True)]
        for stack, part in zip(residuals, evaluated.tokens.split(depth, -1), strict=True)
    ]
    stacked = torch.stack([torch.stack(some) for some in codes])
    found = {
        "eval_quantized": evaluated.latent,
        "eval_indices": shaped(evaluated.tokens),
        "eval_codes": stacked if kind == "GroupedResidualVQ" else stacked[0],
        "decode": module.decode(evaluated.tokens, space),
    }
    if config["coarse"] is not None:
        parts = evaluated.tokens.split(depth, -1)
        some = [
            unit.decode(part[..., : config["coarse"]], space) for unit, part in zip(module.units, parts, strict=True)
        ]
        found["decode_coarse"] = torch.cat(some, -1)

    kept = depth
    if dropout.get("quantize_dropout"):
        kept = _first_levels(dropout, depth, config["dropout_seed"])
        for stack in residuals:
            stack.kept_levels = lambda: kept  # type: ignore[method-assign]
    calls = Calls([unit for stack in residuals for unit in stack.units])
    trained = module.train()(latent)
    losses = calls.losses()
    ((trained.latent * inputs["probe"]).sum() + sum(losses)).backward()
    tokens = shaped(trained.tokens).clone()
    tokens[..., kept:] = -1
    books = [
        # There only the first level learns under beam search; ours does at all levels.
        weights[f"layers.{level}._codebook.embed"] if beams > 1 and level > 0 else unit.codebook[None]
        for stack in residuals
        for level, unit in enumerate(stack.units)
    ]
    same = len({book.shape for book in books}) == 1
    return found | {
        "train_quantized": trained.latent,
        "train_indices": tokens,
        # Where the codes follow gradients, one term there has those of both of ours.
        "train_losses": listed(calls.commitments()),
        "grad_latent": latent.grad,
        "embeds_after1": torch.stack(books) if same else torch.cat([book.flatten() for book in books]),
        **grads(parameters, case),
    }
