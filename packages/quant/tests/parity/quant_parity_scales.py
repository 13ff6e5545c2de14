"""How the cases of multi-scale residual quantization are run on ours: VAR, XQ-GAN, HierarchicalVQ."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from quant_parity_lucid_vq import Stages
from quant_parity_residual_vq import load_vq, only, vq_options, weights_of
from torch import Tensor

from smalti.quant.entropy import bit_entropies, bits_entropy
from smalti.quant.lfq import BinarySphericalOptions, LookupFreeOptions
from smalti.quant.multi_scale import MultiScale, MultiScaleOptions
from smalti.quant.vector import VectorQuantizerOptions

# ---- quant-lucid-hierarchical, var-quantizer-phi, xqgan-quantizers


def _load_phi(module: MultiScale, weights: dict[str, Tensor], key: str) -> None:
    """Fill the phi convolutions; `key` with the number of the convolution in place of `{}`."""
    for number, phi in enumerate(module.phi):
        phi.convolution.load_state_dict({name: weights[f"{key.format(number)}.{name}"] for name in ("weight", "bias")})


def hierarchical(case: dict[str, Any], parity: ModuleType) -> Stages:
    params = dict(only(dict(case["config"]), "params", "latent_scale")["params"])
    images = params.pop("accept_image_fmap", False)
    assert not params.pop("accept_3d_fmap", False), "ours quantizes images and sequences"
    assert not params.pop("kmeans_init", True), "what is drawn first is random there"
    for training in ("nested_dropout", "nested_dropout_min_levels"):
        params.pop(training, None)
    channel_first, shared = params.pop("channel_first", True), params.pop("shared_codebook", True)
    dim, size, scales = params.pop("dim"), params.pop("codebook_size"), params.pop("scales")
    if not isinstance(size, int):
        assert len(set(size)) == 1, "ours has scales of one vocabulary"
        size = size[0]
    share, ratio = params.pop("share_quant_resi", 1), params.pop("quant_resi", 0.5)
    # A sequence is an image of one row.
    lengths = scales if images else [(1, *(scale if isinstance(scale, list) else [scale])) for scale in scales]
    module = MultiScaleOptions(
        quantizer=vq_options({"decay": 0.99, **params}, dim, size),
        shared=shared,
        scales=lengths,
        phi=(min(share, len(scales)) if share > 0 else len(scales)) if ratio else 0,
        phi_ratio=abs(ratio) or 0.5,
        phi_rule="rounded",
        enlargement="bilinear",
    ).build()
    weights = weights_of(case, parity)
    for number, unit in enumerate(module.units):
        load_vq(unit, weights, "vq." if shared else f"vqs.{number}.")
    key = "phi_shared.conv" if share == 1 else "phi_levels.{}.conv"
    if not images:
        rows = {name: F.pad(weight[:, :, None], (0, 0, 1, 1)) for name, weight in weights.items() if weight.ndim == 3}
        weights |= {name: weight for name, weight in rows.items() if name.endswith("conv.weight")}
    _load_phi(module, weights, key)
    given = parity.fill_case_inputs(case)["latent"] * case["config"].get("latent_scale", 0.2)
    latent = given.movedim(1, -1) if channel_first else given
    latent = latent if images else latent[:, None]

    def as_given(output: Tensor) -> Tensor:
        output = output if images else output[:, 0]
        return output.movedim(-1, 1) if channel_first else output

    quantized = module.eval()(latent)
    return {
        "quantized": as_given(quantized.latent),
        "indices": quantized.tokens[..., 0],
        "decode": as_given(module.decode(quantized.tokens, latent.shape[1:-1])),
    }


def _var(variant: dict[str, Any], size: int, dim: int, weights: dict[str, Tensor], **options: Any) -> MultiScale:
    """VAR's quantizer, from the keys that begin with the variant's name."""
    share, ratio = variant["share_quant_resi"], abs(variant["quant_resi"])
    cosine = variant["using_znorm"]
    module = MultiScaleOptions(
        quantizer=VectorQuantizerOptions(
            dim=dim, codebook_size=size, cosine=cosine, unit_length="search" if cosine else "all"
        ),
        scales=variant["v_patch_nums"],
        phi=(share or len(variant["v_patch_nums"])) if ratio else 0,
        phi_ratio=ratio or 0.5,
        **options,
    ).build()
    with torch.no_grad():
        module.units[0].codebook.copy_(weights[f"{variant['name']}.embedding.weight"])
    _load_var_phi(module, weights, variant["name"], share)
    return module


def _load_var_phi(module: MultiScale, weights: dict[str, Tensor], name: str, share: int) -> None:
    part = {0: "quant_resi.{}", 1: "quant_resi.qresi"}.get(share, "quant_resi.qresi_ls.{}")
    _load_phi(module, weights, f"{name}.{part}")


def var_phi(case: dict[str, Any], parity: ModuleType) -> Stages:
    config = only(dict(case["config"]), "vocab_size", "z_channels", "variants")
    weights, latent = weights_of(case, parity), parity.fill_case_inputs(case)["latent"].movedim(1, -1)
    found = {}
    for variant in config["variants"]:
        only(variant, "name", "share_quant_resi", "quant_resi", "using_znorm", "v_patch_nums")
        module = _var(variant, config["vocab_size"], config["z_channels"], weights).eval()
        quantized = module(latent)
        found |= {
            f"{variant['name']}_indices": quantized.tokens[..., 0],
            f"{variant['name']}_f_hat": quantized.latent.movedim(-1, 1),
            f"{variant['name']}_phi_of_scale": torch.tensor(module.phi_of_scale),
        }
    return found


def xqgan(case: dict[str, Any], parity: ModuleType) -> Stages:
    config = only(
        dict(case["config"]),
        *("v_patch_nums", "share_quant_resi", "quant_resi", "beta", "codebook_drop", "entropy_weight", "variants"),
    )
    weights, inputs, found = weights_of(case, parity), parity.fill_case_inputs(case), {}
    scales = config["v_patch_nums"]
    for name, variant in config["variants"].items():
        only(variant, "kind", "codebook_size", "dim", "using_znorm", "scale")
        vq = variant["kind"] == "vq"
        # XQ-GAN's VQ class does not divide the commitment loss by the number of scales.
        options = {
            "commitment_weight": config["beta"] * (len(scales) if vq else 1),
            "dropout": config["codebook_drop"],
            "dropout_start": 1,
        }
        if vq:
            shared = {key: config[key] for key in ("v_patch_nums", "share_quant_resi", "quant_resi")}
            module = _var(
                {**shared, "name": name, "using_znorm": variant["using_znorm"]},
                *(variant["codebook_size"], variant["dim"], weights),
                **options,
            )
        else:
            kind = BinarySphericalOptions if variant["using_znorm"] else LookupFreeOptions
            unit = kind(bits=[variant["dim"]], commitment_weight=0.0, entropy_weight=config["entropy_weight"])
            assert 2 ** variant["dim"] == variant["codebook_size"]
            module = MultiScaleOptions(
                quantizer=unit,
                scales=scales,
                phi=(config["share_quant_resi"] or len(scales)) if config["quant_resi"] else 0,
                phi_ratio=abs(config["quant_resi"]) or 0.5,
                scale_decay=variant["scale"],
                normalise=variant["using_znorm"],
                **options,
            ).build()
            _load_var_phi(module, weights, name, config["share_quant_resi"])
        latent = inputs[f"{name}_latent"].movedim(1, -1)
        quantized = module.eval()(latent)
        sums = [part.movedim(-1, 1) for part in module.partial_sums(quantized.tokens)]
        found |= {f"{name}_f_hat_scale{scale}": part for scale, part in enumerate(sums)}
        found |= {f"{name}_indices": quantized.tokens[..., 0], f"{name}_f_hat": quantized.latent.movedim(-1, 1)}
        if vq:
            total, steps = None, []
            for scale, part in enumerate(quantized.tokens.split(module.areas, 1)):
                total, following = module.advance(total, module.codes(part, scale), scale)
                steps.append(following)
            found |= dict.fromkeys((f"{name}_var_input", f"{name}_next_inputs"), torch.cat(steps[:-1], 1))
        else:
            found |= _entropies(name, variant, latent)
        kept = torch.full((len(latent),), len(scales))
        dropped = int(len(latent) * config["codebook_drop"])
        kept[:dropped] = inputs["dropout"][:dropped]
        module.kept_scales = lambda batch, kept=kept: kept  # type: ignore[method-assign]
        trained = module.train()(latent)
        losses = [trained.losses["codebook"], trained.losses["commitment"]]
        found[f"{name}_train_f_hat"] = trained.latent.movedim(-1, 1)
        found[f"{name}_train_losses"] = torch.stack([torch.zeros(()), *(loss.detach() for loss in losses)])
    return found


def _entropies(name: str, variant: dict[str, Any], latent: Tensor) -> Stages:
    """XQ-GAN's two entropies of the latent, at scale 2: of the bits one by one, and of all codes."""
    whole = F.normalize(latent, dim=-1) if variant["using_znorm"] else latent
    corner = variant["scale"] ** 2 / (math.sqrt(variant["dim"]) if variant["using_znorm"] else 1)
    logits = 4 * corner * whole.reshape(-1, variant["dim"])
    # Its floor under the logarithms of the means, 1e-8, is far below that of all codes, 1e-5.
    means = bit_entropies(torch.sigmoid(logits).mean(0).logit()).sum()
    full = bits_entropy(logits / 0.01)
    return {
        f"{name}_soft_entropy": torch.stack([bits_entropy(logits).sample, means]),
        f"{name}_full_entropy": torch.stack([full.sample, full.batch, full.sample - full.batch]),
    }
