"""Runners of the scalar and lookup-free families: our quantizers on the inputs of a case, stage by stage.

A key of a case's configuration that a runner does not know is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from quant_parity_lucid_vq import Stages, pair
from torch import Tensor

from smalti.core.contracts import Quantizer
from smalti.core.options import QuantizerOptions
from smalti.quant.binary_mapper import BinaryMapper
from smalti.quant.fsp import FiniteScalarPerturbationOptions
from smalti.quant.fsq import FiniteScalarOptions
from smalti.quant.latent import LatentOptions
from smalti.quant.lfq import BinarySphericalOptions, LookupFreeOptions
from smalti.quant.product import ProductOptions
from smalti.quant.projected import Projected, ProjectedOptions
from smalti.quant.random_projection import RandomProjectionQuantizer
from smalti.quant.rotated import Rotated, RotatedOptions

Case = dict[str, Any]


class Keys(dict[str, Any]):
    """A configuration whose keys are taken one by one; `done` fails where one is left."""

    def take(self, key: str, default: Any = None) -> Any:
        return self.pop(key, default)

    def done(self) -> None:
        assert not self, f"options that the runner does not know: {dict(self)}"


def _last(tensor: Tensor) -> Tensor:
    """Channel-first images to channel-last; sequences are channel-last."""
    return tensor.movedim(1, -1) if tensor.ndim == 4 else tensor


def _as(tensor: Tensor, like: Tensor) -> Tensor:
    """Channel-last to the axes of the case."""
    return tensor.movedim(-1, 1) if like.ndim == 4 else tensor


def _grid(tokens: Tensor, latent: Tensor) -> Tensor:
    """Tokens `(B, L, S)` as `(B, *space)`, with the streams behind where there are several."""
    tokens = tokens.view(*latent.shape[:-1], -1)
    return tokens[..., 0] if tokens.shape[-1] == 1 else tokens


def _table(quantizer: Quantizer) -> Tensor:
    """The codes of all tokens in order."""
    (size,) = quantizer.vocab
    return quantizer.decode(torch.arange(size).view(1, -1, 1), (size,))[0]


def _backward(quantizer: Quantizer, latent: Tensor, probe: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Training output, sum of losses, gradient of sum(output * probe) + losses; the latent as the case has it."""
    latent = latent.clone().requires_grad_()
    quantized = quantizer.train()(_last(latent))
    loss = sum(quantized.losses.values(), torch.zeros(()))
    output = _as(quantized.latent, latent)
    ((output * probe).sum() + loss).backward()
    assert latent.grad is not None
    return output.detach(), loss.detach(), latent.grad


# ---------------------------------------------------------------------------- vector-quantize-pytorch


def _wrapped(unit: QuantizerOptions, width: int, books: int, keys: Keys) -> QuantizerOptions:
    """Codebooks side by side, rotated, behind projections: as far as the configuration asks for them."""
    options = unit if books == 1 else ProductOptions(quantizers=(unit,), branches=books)
    if keys.take("orthogonal_rotation", False):
        options = RotatedOptions(quantizer=options)
    dim = keys.take("dim", width * books)
    bias, scale = keys.take("projection_has_bias", True), keys.take("cosine_sim_project_in_scale")
    cosine = keys.take("cosine_sim_project_in", False)
    if dim == width * books:
        return options
    return ProjectedOptions(
        dim=dim, quantizer=options, bias=bias, cosine=(scale or keys.take("scale_of_codes", 1.0)) if cosine else None
    )


@torch.no_grad()
def _filled(quantizer: Quantizer, case: Case, parity: ModuleType) -> Quantizer:
    """Weights of the original in the wrappers."""
    weights = parity.fill_state_dict(case["state_dict"], case["weight_seed"])
    weights.pop("mask", None)
    if isinstance(quantizer, Projected):
        inner = quantizer.unit
        for name, weight in quantizer.named_parameters(recurse=True):
            if name.startswith("project_"):
                value = weights.pop(name)
                weight.copy_(value.T if value.shape != weight.shape else value)
    else:
        inner = quantizer
    if isinstance(inner, Rotated):
        inner.rotation.copy_(weights.pop("orthogonal_rot"))
    assert not weights, f"weights that the runner does not know: {list(weights)}"
    return quantizer


def _gradients(quantizer: Quantizer, case: Case) -> Stages:
    found = {}
    for name, weight in quantizer.named_parameters():
        shape = case["state_dict"][name]["shape"]
        gradient = weight.grad.T if list(weight.shape) != shape else weight.grad
        found["grad_" + name.replace(".", "_")] = gradient
    return found


def _scalar_stages(quantizer: Quantizer, case: Case, parity: ModuleType, scale: float) -> Stages:
    inputs = parity.fill_case_inputs(case)
    latent = inputs["latent"] * scale
    with torch.no_grad():
        evaluated = quantizer.eval()(_last(latent))
        decoded = quantizer.decode(evaluated.tokens, _last(latent).shape[1:-1])
    train, loss, gradient = _backward(quantizer, latent, inputs["probe"])
    return {
        "eval_quantized": _as(evaluated.latent, latent),
        "eval_indices": _grid(evaluated.tokens, _last(latent)),
        "decode": _as(decoded, latent),
        "train_quantized": train,
        "loss": pair(loss),
        "grad_latent": gradient,
        **_gradients(quantizer, case),
    }


def lucid_lfq(case: Case, parity: ModuleType) -> Stages:
    """LFQ and its spherical form, BSQ."""
    config, keys = Keys(case["config"]), Keys(case["config"]["params"])
    config.take("params")
    table, temperature = config.take("table", False), 1 / config.take("inv_temperature", 100.0)
    scale = config.take("latent_scale", 1.0)
    config.take("decode")
    config.done()

    books, size, dim = keys.take("num_codebooks", 1), keys.take("codebook_size"), keys.get("dim")
    bits = dim // books if size is None else int(math.log2(size))
    spherical = keys.take("spherical", False)
    softplus, offset = keys.take("experimental_softplus_entropy_loss", False), keys.take("entropy_loss_offset", 5.0)
    assert books == 1 or not softplus, "the original averages entropies of codebooks before the softplus"
    assert keys.take("frac_per_sample_entropy", 1.0) == 1.0, "a random subset of tokens"
    weights: dict[str, Any] = {
        "entropy_weight": keys.take("entropy_loss_weight", 0.1),
        "commitment_weight": keys.take("commitment_loss_weight", 0.0),
        "batch_weight": keys.take("diversity_gamma", 1.0),
        "entropy_offset": offset if softplus else None,
    }
    fixed: dict[str, Any] = {
        "bits": (bits,),
        "bit_order": "msb",
        "scale": keys.take("codebook_scale", 1.0),
        "soft_clamp": keys.take("soft_clamp_input_value"),
        "entropy_temperature": temperature,
        "entropy_floor": "clamp",
    }
    keys["scale_of_codes"] = fixed["scale"]

    def built(**changes: Any) -> Quantizer:
        unit = (BinarySphericalOptions if spherical else LookupFreeOptions)(**fixed, **weights | changes)
        rest = Keys(keys)
        options = _wrapped(unit, bits, books, rest)
        rest.take("scale_of_codes")
        rest.done()
        return _filled(options.build(), case, parity)

    def term(**changes: Any) -> Tensor:
        latent = parity.fill_case_inputs(case)["latent"] * scale
        off = {"entropy_weight": 0.0, "commitment_weight": 0.0, "entropy_offset": None}
        with torch.no_grad():
            (loss,) = built(**off | changes).train()(_last(latent)).losses.values()
        return pair(loss)

    found = _scalar_stages(built(), case, parity, scale)
    found["per_sample_entropy"] = term(entropy_weight=1.0, batch_weight=0.0)
    found["batch_entropy"] = -term(entropy_weight=1.0, sample_weight=0.0, batch_weight=1.0)
    found["commitment"] = term(commitment_weight=1.0) if weights["commitment_weight"] else pair(0.0)
    if table:
        found["table"] = _table(built())
    return found


def lucid_fsq(case: Case, parity: ModuleType) -> Stages:
    """FSQ, in both forms."""
    config, keys = Keys(case["config"]), Keys(case["config"]["params"])
    config.take("params")
    table, scale = config.take("table", False), config.take("latent_scale", 1.0)
    config.take("decode")
    config.done()
    levels, books = tuple(keys.take("levels")), keys.take("num_codebooks", 1)
    unit = FiniteScalarOptions(
        levels=levels,
        symmetric=keys.take("preserve_symmetry", False),
        bound="clamp" if keys.take("bound_hard_clamp", False) else "tanh",
        noise=keys.take("noise_dropout", 0.0),
    )
    assert unit.noise == 0, "random noise"
    quantizer = _filled(_wrapped(unit, len(levels), books, keys).build(), case, parity)
    keys.done()
    found = _scalar_stages(quantizer, case, parity, scale)
    if table:
        found["table"] = _table(quantizer)
    return found


def lucid_latent(case: Case, parity: ModuleType) -> Stages:
    """Latent quantization; several codebooks share their values. The cases scale the latent by 0.4."""
    config, keys = Keys(case["config"]), Keys(case["config"]["params"])
    config.take("params")
    scale = config.take("latent_scale", 0.4)
    config.done()
    levels, books = tuple(keys.take("levels")), keys.take("num_codebooks", 1)
    unit = LatentOptions(
        levels=levels,
        learned=keys.take("optimize_values", True),
        commitment_weight=keys.take("commitment_loss_weight", 0.1),
        codebook_weight=keys.take("quantization_loss_weight", 0.1),
    )
    assert books == 1, "codebooks that share values"
    quantizer = _wrapped(unit, len(levels), books, keys).build()
    keys.done()
    layout = dict(case["state_dict"])
    inner = quantizer.unit if isinstance(quantizer, Projected) else quantizer
    for channel, values in enumerate(inner.values):
        constant = torch.tensor(layout.pop(f"values_per_latent.{channel}")["constant"])
        assert torch.equal(values, constant)
    _filled(quantizer, case | {"state_dict": layout}, parity)

    inputs = parity.fill_case_inputs(case)
    latent = (inputs["latent"] * scale).requires_grad_()
    quantized = quantizer.train()(_last(latent))
    output = _as(quantized.latent, latent)
    losses = {name: loss.detach() for name, loss in quantized.losses.items()}
    # The original compares before and after the projections, where it has some, and its codebook term reaches the
    # output instead of the values, by which it takes the gradient of the commitment back.
    commitment = unit.commitment_weight * torch.nn.functional.mse_loss(latent, output.detach())
    codebook = unit.codebook_weight * torch.nn.functional.mse_loss(output, latent.detach())
    ((output * inputs["probe"]).sum() + commitment + codebook).backward()
    total = sum(losses.values()) if inner is quantizer and unit.learned else (commitment + codebook).detach()
    assert latent.grad is not None
    projections = {name: weight for name, weight in quantizer.named_parameters() if name.startswith("project_")}
    return {
        "quantized": output,
        "indices": _grid(quantized.tokens, _last(latent)),
        "loss": pair(total),
        "grad_latent": latent.grad,
        **{"grad_" + name.replace(".", "_"): weight.grad for name, weight in projections.items()},
    }


def lucid_fsp(case: Case, parity: ModuleType) -> Stages:
    config, keys = Keys(case["config"]), Keys(case["config"]["params"])
    config.take("params")
    scale = config.take("latent_scale", 1.0)
    config.done()
    levels, norm = tuple(keys.take("levels")), keys.take("vector_norm", "var_tanh")
    variance = {"var": 1.0, "kurt": 1.0, "var_tanh": 0.8225, "var_sigmoid": 3.29, "var_laplace": 2.0}[norm]
    options = FiniteScalarPerturbationOptions(
        levels=levels,
        activation=keys.take("act_name", "tanh"),
        output="inverse" if keys.take("need_inv_act", False) else "uniform",
        noise=1 - keys.take("quantize_rate", 0.0),
        variance=variance,
        skewness_weight=0.06 if norm == "kurt" else 0.0,
        kurtosis_weight=0.05 if norm == "kurt" else 0.0,
    )
    assert options.noise == 0, "random noise"
    found = _scalar_stages(_wrapped(options, len(levels), 1, keys).build(), case, parity, scale)
    keys.done()
    return {
        "quantized": found["eval_quantized"],
        "indices": found["eval_indices"],
        "norm_loss": found["loss"],
        "decode": found["decode"],
        "grad_latent": found["grad_latent"],
    }


def lucid_binary_mapper(case: Case, parity: ModuleType) -> Stages:
    config, keys = Keys(case["config"]), Keys(case["config"]["params"])
    config.take("params")
    config.done()
    mapper = BinaryMapper(keys.take("bits"), keys.take("kl_loss_threshold", math.log(2)))
    keys.done()
    inputs = parity.fill_case_inputs(case)
    logits = inputs["logits"].requires_grad_()
    mapped = mapper(logits, sample=False)
    ((mapped.one_hot * inputs["probe"]).sum() + mapped.loss).backward()
    return {
        "indices": mapped.tokens,
        "aux_loss": pair(mapped.loss),
        "grad_logits": logits.grad,
        "log_prob": mapper.log_prob(logits, mapped.tokens),
    }


def lucid_random_projection(case: Case, parity: ModuleType) -> Stages:
    """The original has a second random map, of all projections together, in front of its codebooks."""
    config, keys = Keys(case["config"]), Keys(case["config"]["params"])
    config.take("params")
    config.done()
    weights = parity.fill_state_dict(case["state_dict"], case["weight_seed"])
    codes = torch.nn.functional.normalize(weights.pop("vq._codebook.embed"), dim=-1)
    first = weights.pop("rand_projs").movedim(1, -1).flatten(0, 1)
    books, size, width = codes.shape
    second, bias = torch.eye(books * width), torch.zeros(books * width)
    if "vq.project_in.weight" in weights:
        second, bias = weights.pop("vq.project_in.weight"), weights.pop("vq.project_in.bias")
    dim = keys.take("dim")
    assert (keys.take("codebook_size"), keys.take("num_codebooks", 1)) == (size, books)
    assert keys.take("codebook_dim") * books == len(first)
    quantizer = RandomProjectionQuantizer(dim, size, width, books, normalise=keys.take("norm", True))
    keys.done()
    quantizer.projections.copy_((second @ first).view(books, width, dim))
    quantizer.biases.copy_(bias.view(books, width))
    quantizer.codes.copy_(codes)
    latent = parity.fill_case_inputs(case)["latent"]
    tokens = quantizer(latent)
    logits = quantizer.similarities(latent).flatten(0, 2)
    entropy = torch.nn.functional.cross_entropy(logits, tokens.flatten())
    return {"indices": _grid(tokens, latent), "cross_entropy": pair(entropy)}


# ---------------------------------------------------------------------------- visual-tokenizer-pytorch


def _vistok(quantizer: Quantizer, case: Case, parity: ModuleType, weights: dict[str, float], scale: float) -> Stages:
    inputs = parity.fill_case_inputs(case)
    latent = (inputs["latent"] * scale).requires_grad_()
    quantized = quantizer.train()(_last(latent))
    losses = {name: quantized.losses.get(name, torch.zeros(())) for name in ("commitment", "entropy")}
    total = weights["commit"] * losses["commitment"] + weights["entropy"] * losses["entropy"]
    output = _as(quantized.latent, latent)
    ((output * inputs["probe"]).sum() + total).backward()
    assert latent.grad is not None
    shares = torch.bincount(quantized.tokens.flatten()).double() / quantized.tokens.numel()
    return {
        "quantized": output,
        "indices": _grid(quantized.tokens, _last(latent)),
        "perplexity": pair((-torch.special.xlogy(shares, shares).sum()).exp()),
        "loss_commit": pair(losses["commitment"]),
        "loss_vq": pair(0.0),
        "loss_entropy": pair(losses["entropy"]),
        "grad_latent": latent.grad,
    }


def _vistok_config(case: Case, name: str) -> tuple[Keys, dict[str, float], float]:
    config = Keys(case["config"])
    assert config.take("class") == name
    params, weights, scale = Keys(config.take("params")), config.take("weights"), config.take("latent_scale", 1.0)
    config.done()
    assert weights.keys() == {"commit", "vq", "entropy"}
    return params, weights, scale


def vistok_lfq(case: Case, parity: ModuleType) -> Stages:
    params, weights, scale = _vistok_config(case, "LookupFreeQuantizer")
    options = LookupFreeOptions(
        bits=(params.take("dim"),),
        commitment_weight=1.0,
        entropy_weight=1.0 if params.take("use_entropy_reg", True) else 0.0,
        entropy_temperature=params.take("entropy_reg_temp", 0.01),
    )
    params.done()
    return _vistok(options.build(), case, parity, weights, scale)


def vistok_fsq(case: Case, parity: ModuleType) -> Stages:
    params, weights, scale = _vistok_config(case, "FiniteScalarQuantizer")
    options = FiniteScalarOptions(levels=tuple(params.take("levels")))
    params.done()
    return _vistok(options.build(), case, parity, weights, scale)


def vistok_table(case: Case, parity: ModuleType) -> Stages:
    """All codes, and the tokens of latents that lie on them."""
    config = Keys(case["config"])
    if "dim" in config:
        quantizer: Quantizer = LookupFreeOptions(bits=(config.take("dim"),)).build().eval()
        codes = latents = _table(quantizer)
    else:
        levels = torch.tensor(config.take("levels"))
        quantizer = FiniteScalarOptions(levels=tuple(levels.tolist())).build().eval()
        codes = _table(quantizer)
        half, offset = (levels - 1) * 1.001 / 2, 0.5 * (levels % 2 == 0)
        latents = torch.atanh((codes * (levels // 2) + offset) / half) - torch.atanh(offset / half)
    config.done()
    return {"codes": codes, "indices_again": quantizer(latents[None]).tokens.flatten()}


# ---------------------------------------------------------------------------- Open-MAGVIT2


def magvit2_lfq(case: Case, parity: ModuleType) -> Stages:
    config, params = Keys(case["config"]), Keys(case["config"]["params"])
    config.take("params")
    table, weights, scale = config.take("table", False), config.take("weights"), config.take("latent_scale", 1.0)
    config.done()
    assert weights.keys() == {"entropy", "commit"}
    dim = params.take("dim")
    assert params.take("codebook_size", 2**dim) == 2**dim
    assert params.take("num_codebooks", 1) == 1
    factorized = params.take("token_factorization", False)
    factors = tuple(params.take("factorized_bits", (9, 9)))
    shares = {
        "sample_weight": params.take("sample_minimization_weight", 1.0),
        "batch_weight": params.take("batch_maximization_weight", 1.0),
    }
    params.done()
    inputs = parity.fill_case_inputs(case)
    latent = inputs["latent"] * scale

    def built(entropy_weight: float, commitment_weight: float, **shares: float) -> Quantizer:
        return LookupFreeOptions(
            bits=factors if factorized else (dim,),
            entropy_weight=entropy_weight,
            commitment_weight=commitment_weight,
            **shares,
        ).build()

    def term(*arguments: float, **shares: float) -> Tensor:
        (loss,) = built(*arguments, **shares).train()(_last(latent)).losses.values()
        return pair(loss)

    quantizer = built(weights["entropy"], weights["commit"], **shares)
    output, _, gradient = _backward(quantizer, latent, inputs["probe"])
    tokens = quantizer.eval()(_last(latent)).tokens
    found = {
        "quantized": output,
        "entropy_loss": term(1.0, 0.0, **shares),
        "per_sample_entropy": term(1.0, 0.0, batch_weight=0.0),
        "codebook_entropy": -term(1.0, 0.0, sample_weight=0.0),
        "commitment": term(0.0, 1.0),
        "grad_latent": gradient,
        "decode": _as(quantizer.decode(tokens, _last(latent).shape[1:-1]), latent),
    }
    grids = [_grid(part, _last(latent)) for part in tokens.split(1, -1)]
    found |= dict(zip(("indices_pre", "indices_post"), grids, strict=True)) if factorized else {"indices": grids[0]}
    if table:
        found["table"] = _table(quantizer)
    return found


RUNNERS: dict[str, Callable[[Case, ModuleType], Stages]] = {
    "quant-lucid-lfq": lucid_lfq,
    "quant-lucid-bsq": lucid_lfq,
    "quant-lucid-fsq": lucid_fsq,
    "quant-lucid-latent": lucid_latent,
    "quant-lucid-fsp": lucid_fsp,
    "quant-lucid-binary-mapper": lucid_binary_mapper,
    "quant-lucid-random-projection": lucid_random_projection,
    "quant-vistok-lfq": vistok_lfq,
    "quant-vistok-fsq": vistok_fsq,
    "quant-vistok-table-": vistok_table,
    "quant-magvit2-lfq": magvit2_lfq,
}
