"""How the cases of GaussianToken are run on ours, and those of its plain VQGAN.

The encoder runs in float64: three rounds with random weights amplify its rounding a hundredfold, to 1.1e-3 of a
deviation.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from published_cnn import Run
from published_parts import Case, Stages, channel_first, check_layout, imported, known, override, watched
from torch import Tensor, nn

from smalti.core.checkpoints.importing import import_checkpoint
from smalti.core.checkpoints.rules import to_ours
from smalti.gaussian.gaussians import Gaussians
from smalti.gaussian.gaussiantoken.checkpoint import embed_config, embed_rules
from smalti.gaussian.gaussiantoken.embed import GaussianEmbed, GaussianEmbedOptions
from smalti.gaussian.gaussiantoken.tokenizer import GaussianTokenizer

OPERATIONS = {"cross_attn": "attention", "ffn": "feed-forward", "refine": "refine", "spconv": "sparse-convolution"}
QUANTIZER = {
    "learnable_codebook": False,
    "ema_update": True,
    "sync_codebook": True,
    "dim": None,
    "codebook_size": 1024,
    "accept_image_fmap": False,
    "decay": 0.8,
    "commitment_weight": 1.0,
    "threshold_ema_dead_code": 2,
    "kmeans_init": True,
    "kmeans_iters": 10,
}
NETWORK = {
    "double_z": False,
    "z_channels": None,
    "resolution": 128,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": None,
    "num_res_blocks": 4,
}
LOSS = {
    "disc_conditional": False,
    "disc_in_channels": 3,
    "disc_start_epoch": 0,
    "gan_start_epoch": 5,
    "disc_weight": 0.8,
    "gen_loss_weight": 0.1,
    "lecam_loss_weight": 0.05,
    "commit_weight": 0.25,
}


def _model(config: dict[str, Any]) -> dict[str, Any]:
    return known(
        config,
        fm_shape=None,
        z_channels=None,
        embed_dim=64,
        num_gs=None,
        xy_range=[-1, 1],
        initial_scale_range=[0.1, 4.0],
        final_scale_range=[0.1, 3.0],
        include_opa=False,
        img_encoder_cfg={},
        img_decoder_cfg={},
        vq_cfg={},
        gs_embed_cfg=None,
        loss_cfg=LOSS,
        use_ema=False,
    )


def _embed_options(config: dict[str, Any]) -> dict[str, Any]:
    """Options of ours that the configuration gives, as far as they are not those of single layers."""
    config = known(
        config,
        fm_lifter_cfg={},
        gaussian_lifter_cfg={},
        anchor_encoder_cfg={},
        attn_encoder_cfg={},
        attn_decoder_cfg={},
        ffn_cfg={},
        refine_cfg={},
        spconv_cfg={},
        operation_order=None,
        op_param_share=True,
    )
    lifter = known(config["fm_lifter_cfg"], in_dim=None, pe_version="sine", out_dim=None)
    first = known(
        config["gaussian_lifter_cfg"],
        num_anchor=None,
        embed_dim=None,
        anchor_grad=True,
        ins_feat_grad=True,
        feature_dim=None,
        include_opa=True,
    )
    width = first["embed_dim"]
    anchors = known(config["anchor_encoder_cfg"], embed_dim=width, include_opa=True, feature_dim=width)
    encoder = known(config["attn_encoder_cfg"], fm_shape=None, encoder_layer_cfg={}, num_layers=None)
    decoder = known(
        config["attn_decoder_cfg"],
        fm_shape=None,
        decoder_layer_cfg={},
        num_layers=None,
        proj_drop=0.0,
        residual_mode="cat",
    )
    ffn = known(
        config["ffn_cfg"],
        in_channels=None,
        pre_norm=True,
        out_norm=False,
        embed_dim=width,
        num_fcs=2,
        ffn_drop=0.0,
        add_identity=True,
    )
    refine = known(
        config["refine_cfg"],
        embed_dim=width,
        xy_range=None,
        initial_scale_range=None,
        final_scale_range=None,
        refine_state=None,
        include_opa=True,
        dim_feature=width,
        z_channels=None,
    )
    spconv = known(
        config["spconv_cfg"], in_channels=width, out_channels=width, kernel_size=5, fm_shape=None, use_out_proj=False
    )
    widths = (lifter["out_dim"], first["feature_dim"], anchors["embed_dim"], anchors["feature_dim"])
    widths += (ffn["embed_dim"], refine["embed_dim"], refine["dim_feature"], spconv["in_channels"])
    assert set(widths) == {width}, widths
    assert first["include_opa"] == anchors["include_opa"] == refine["include_opa"]
    assert refine["refine_state"] == list(range(len(refine["refine_state"])))
    concatenates = decoder["residual_mode"] == "cat"
    assert ffn["in_channels"] == (2 if concatenates else 1) * width
    lowest, highest = refine["initial_scale_range"]
    return {
        "gaussians": first["num_anchor"],
        "width": width,
        "positions": {"sine": "sine", "v2": "sine", "learned": "learned", "v3": "learned"}[lifter["pe_version"]],
        "encoder": _stack(encoder["num_layers"], encoder["encoder_layer_cfg"], width),
        "operations": [OPERATIONS[name] for name in config["operation_order"]],
        "share": config["op_param_share"],
        "attention": _stack(decoder["num_layers"], decoder["decoder_layer_cfg"], width)
        | {"shortcut": "concatenate" if concatenates else "add", "last_dropout": decoder["proj_drop"]},
        "feed_forward": {
            "linear": ffn["num_fcs"],
            "norm_in": ffn["pre_norm"],
            "norm_out": ffn["out_norm"],
            "shortcut": ffn["add_identity"],
            "dropout": ffn["ffn_drop"],
        },
        "sparse_convolution": {"kernel": spconv["kernel_size"], "projected": spconv["use_out_proj"]},
        "moved": len(refine["refine_state"]),
        "opacity": first["include_opa"],
        "learn_anchors": first["anchor_grad"],
        "learn_features": first["ins_feat_grad"],
        "centres": refine["xy_range"],
        "scales": [lowest, highest],
        "final_scale": refine["final_scale_range"][1],
    }


def _stack(layers: int, config: dict[str, Any], width: int) -> dict[str, Any]:
    layer = known(config, embed_dim=width, dropout=0.1, activation="relu", n_levels=1, num_heads=4, n_points=4)
    assert (layer["embed_dim"], layer["n_levels"]) == (width, 1)
    return {
        "layers": layers,
        "heads": layer["num_heads"],
        "points": layer["n_points"],
        "activation": layer["activation"],
        "dropout": layer["dropout"],
    }


class Traced:
    """Gaussians of a feature map, and what operations and parts give on the way."""

    def __init__(self, embed: GaussianEmbed, features: Tensor) -> None:
        found: list[tuple[str, Tensor]] = []
        seen = {"lifter": embed.lifter, "anchor_embed0": embed.anchor_encoder, "memory": embed.encoder[-1]}
        hooks = [_record(module, name, found) for name, module in seen.items()]
        hooks += [_record(module, "op", found) for module in dict.fromkeys(embed.operations)]
        with torch.no_grad():
            self.gaussians: Gaussians = embed(features).gaussians
        for hook in hooks:
            hook.remove()
        operations = [output for name, output in found if name == "op"]
        first = dict(reversed(found))
        given = self.gaussians
        self.stages = {
            "lifter": first["lifter"],
            "positions": embed.lifter.positions(*features.shape[1:3]),
            "anchor_embed0": first["anchor_embed0"][:1],
            "memory": first["memory"],
            **{f"op{number}": output for number, output in enumerate(operations)},
            "means": given.means,
            "scales": given.scales,
            "rotations": given.rotations[..., None],
            "opacities": given.opacities[..., None],
            "features": given.features,
        }


def _record(module: nn.Module, name: str, found: list[tuple[str, Tensor]]) -> Any:
    return module.register_forward_hook(lambda _module, _inputs, output: found.append((name, output)))


def gaussiantoken(case: Case, parity: ModuleType) -> Stages:
    """The whole tokenizer, or the VQGAN without Gaussians; stages `raw.*` and `ema.*` where averages are there, too."""
    config = _model(case["config"])
    if config["gs_embed_cfg"] is None:
        return vqgan(case, parity, config)
    embed = _embed_options(config["gs_embed_cfg"])
    size = config["fm_shape"][0] * 2 ** (len(config["img_encoder_cfg"]["ch_mult"]) - 1)
    quantizer = known(config["vq_cfg"], **QUANTIZER)
    commitment = known(config["loss_cfg"], **LOSS)["commit_weight"] * quantizer["commitment_weight"]
    assert config["fm_shape"][0] == config["fm_shape"][1]
    assert not quantizer["accept_image_fmap"]
    overrides = (
        override("embed", embed),
        override("preprocessing.image_size", size),
        override("quantizer.commitment_weight", commitment),
        override("quantizer.ema_decay", quantizer["decay"]),
        override("quantizer.revive_below", float(quantizer["threshold_ema_dead_code"])),
    )
    if not case["outputs"]:
        _check(check_layout(case, overrides), config)
        check_layout(case)
        return {}
    weights = parity.fill_state_dict(case["state_dict"], case["weight_seed"])
    _check_inferred(weights, embed)
    inputs = parity.fill_case_inputs(case)
    averaged = any(name.startswith("model_ema.") for name in weights)
    found: Stages = {}
    for prefix, ema in (("raw.", False), ("ema.", True)) if averaged else (("", False),):
        tokenizer = import_checkpoint(weights, None, overrides, ema=ema)
        tokenizer.encoder.double()
        _check(tokenizer, config)
        found |= {f"{prefix}{name}": value for name, value in _stages(tokenizer, inputs["image"].double()).items()}
        if not ema and "given_tokens" in inputs:
            found |= _given(tokenizer, inputs)
    return found


def _check(tokenizer: nn.Module, config: dict[str, Any]) -> None:
    assert isinstance(tokenizer, GaussianTokenizer)
    _check_networks(tokenizer, config)
    assert tokenizer.options.embed.gaussians == config["num_gs"]
    assert list(tokenizer.map_size) == config["fm_shape"]


def _check_networks(tokenizer: Any, config: dict[str, Any]) -> None:
    networks = [known(config[name], **NETWORK) for name in ("img_encoder_cfg", "img_decoder_cfg")]
    for network, options in zip(networks, (tokenizer.options.encoder, tokenizer.options.decoder), strict=True):
        assert list(options.widths) == [network["ch"] * multiplier for multiplier in network["ch_mult"]]
        assert options.blocks == options.middle_blocks == network["num_res_blocks"]
        assert options.latent_width == network["z_channels"]
    quantizer = known(config["vq_cfg"], **QUANTIZER)
    assert (quantizer["ema_update"], quantizer["learnable_codebook"], quantizer["kmeans_init"]) == (True, False, True)
    assert tokenizer.quantizer.vocab == (quantizer["codebook_size"],)
    assert tokenizer.quantizer.dim == quantizer["dim"] == config["z_channels"]


def _check_inferred(weights: dict[str, Tensor], embed: dict[str, Any], prefix: str = "gs_embed.") -> None:
    """What names and shapes tell is what the configuration says."""
    inferred = embed_config({name: tuple(tensor.shape) for name, tensor in weights.items()}, prefix)
    for name, value in inferred.items():
        expected = {key: embed[name][key] for key in value} if isinstance(value, dict) else embed[name]
        assert value == expected, (name, value, expected)


def _stages(tokenizer: GaussianTokenizer, image: Tensor) -> Stages:
    with torch.no_grad():
        encoded, output = watched(tokenizer.encoder, lambda: tokenizer(image))
        traced = Traced(tokenizer.embed, encoded)
    return {
        "encoder": channel_first(encoded),
        **traced.stages,
        "positions": traced.stages["positions"][None],
        "indices": output.tokens[..., 0],
        "quantized": output.features["latent"],
        "rendered": channel_first(output.features["map"]),
        "reconstruction": output.images,
    }


def _given(tokenizer: GaussianTokenizer, inputs: dict[str, Tensor]) -> Stages:
    """Gaussians that the case gives, drawn and decoded."""
    tokens = inputs["given_tokens"]
    with torch.no_grad():
        gaussians = Gaussians(
            inputs["given_means"].tanh(),
            0.1 + 3.3 * inputs["given_scales"].sigmoid(),
            math.pi * inputs["given_rotations"].sigmoid()[..., 0],
            tokenizer.quantizer.decode(tokens[..., None], (tokens.shape[1],)),
            torch.ones(tokens.shape),
        )
        drawn = tokenizer.drawn(gaussians)
        return {"given.rendered": channel_first(drawn), "given.reconstruction": tokenizer.decoder(drawn)}


def vqgan(case: Case, parity: ModuleType, config: dict[str, Any]) -> Stages:
    """The VQGAN without Gaussians."""
    quantizer = known(config["vq_cfg"], **QUANTIZER)
    assert quantizer["accept_image_fmap"]
    if not case["outputs"]:
        _check_networks(check_layout(case), config)
        return {}
    image = parity.fill_case_inputs(case)["image"]
    overrides = [
        override("preprocessing.image_size", image.shape[-1]),
        override("quantizer.ema_decay", quantizer["decay"]),
    ]
    averaged = any(name.startswith("model_ema.") for name in case["state_dict"])
    found: Stages = {}
    for prefix, ema in (("raw.", False), ("ema.", True)) if averaged else (("", False),):
        tokenizer = imported(case, parity, overrides, ema=ema)
        _check_networks(tokenizer, config)
        run = Run(tokenizer, image)
        stages = {
            "encoder": channel_first(run.encoded),
            "indices": run.indices,
            "quantized": channel_first(run.quantized.latent),
            "reconstruction": run.reconstruction,
        }
        found |= {f"{prefix}{name}": value for name, value in stages.items()}
    return found


def embedding(case: Case, parity: ModuleType) -> Stages:
    """The part between feature map and Gaussians alone, with the names that it has within a checkpoint."""
    options = _embed_options(case["config"])
    weights = parity.fill_state_dict(case["state_dict"], case["weight_seed"])
    _check_inferred(weights, options, "")
    features = parity.fill_case_inputs(case)["feature_map"].movedim(1, -1)
    height, width = case["config"]["attn_encoder_cfg"]["fm_shape"]
    assert features.shape[1:3] == (height, width)
    embed = GaussianEmbedOptions.model_validate(options).build(
        case["config"]["fm_lifter_cfg"]["in_dim"], case["config"]["refine_cfg"]["z_channels"]
    )
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("op_module_map.")}
    ours, unknown = to_ours(embed_rules(options, "", ""), kept)
    assert not unknown, unknown
    embed.load_state_dict(ours)
    traced = Traced(embed.eval(), features)
    with torch.no_grad():
        drawn = traced.gaussians.rasterize(height, width)
    return traced.stages | {"source_tokens": traced.stages["lifter"], "rendered": drawn}


RUNNERS = {"gaussiantoken-": gaussiantoken, "gaussiantoken-embed-options": embedding}
