"""Runners of the published tokenizers between convolutional networks."""

from __future__ import annotations

from copy import deepcopy
from types import ModuleType
from typing import Any

import torch
from published_parts import (
    Case,
    Stages,
    channel_first,
    check_layout,
    imported,
    known,
    override,
    pair,
    phi_convolutions,
    preclamp,
    unit,
    var_overrides,
    watched,
)
from torch import Tensor

from smalti.core.codebook_health import CodebookHealth
from smalti.core.tokenizer import ComposedTokenizer


def check_networks(
    tokenizer: ComposedTokenizer, config: dict[str, Any], *, width: str = "ch", multipliers: str = "ch_mult"
) -> None:
    """What the layout tells of the networks is what the case was built from, by names of the case."""
    encoder, decoder = tokenizer.options.encoder, tokenizer.options.decoder
    found = (encoder.width, list(encoder.multipliers), encoder.blocks, encoder.latent_width)
    assert found == tuple(config[name] for name in (width, multipliers, "num_res_blocks", "z_channels"))
    assert (decoder.widths, decoder.latent_width) == (encoder.widths, encoder.latent_width)


class Run:
    """Images through a tokenizer with one grid of tokens."""

    def __init__(self, tokenizer: ComposedTokenizer, images: Tensor) -> None:
        self.tokenizer = tokenizer
        with torch.no_grad():
            output = tokenizer(images)
            self.reconstruction = output.images
            self.encoded, tokens = watched(tokenizer.encoder, lambda: tokenizer.encode(images))
            self.latent = tokenizer.to_codes(self.encoded)
            self.quantized = tokenizer.quantizer(self.latent)
        assert torch.equal(tokens, output.tokens)
        assert torch.equal(tokens, self.quantized.tokens)
        self.indices = self.quantized.tokens[..., 0].view(self.latent.shape[:-1])

    def decoded(self, tokens: Tensor) -> Tensor:
        """Images of a grid of tokens `(B, h, w)`, not clamped."""
        layout = self.tokenizer.quantizer.layout(tuple(tokens.shape[1:]))
        return preclamp(self.tokenizer, tokens.reshape(len(tokens), -1, 1), layout)


@torch.no_grad()
def losses(tokenizer: ComposedTokenizer, latent: Tensor) -> dict[str, Tensor]:
    """The quantizer's losses in training, of which the tokenizer itself learns nothing."""
    found: dict[str, Tensor] = deepcopy(tokenizer.quantizer).train()(latent).losses
    return found


def llamagen(case: Case, parity: ModuleType) -> Stages:
    config = known(
        case["config"],
        family="llamagen",
        vq_model=None,
        downsample=16,
        codebook_size=16384,
        codebook_embed_dim=8,
        codebook_l2_norm=True,
        codebook_show_usage=True,
        commit_loss_beta=0.25,
        entropy_loss_ratio=0.0,
        ch=128,
        ch_mult=[1, 1, 2, 2, 4],
        num_res_blocks=2,
        z_channels=256,
        in_channels=3,
        out_channels=3,
        dropout_p=0.0,
    )
    tokenizer = imported(
        case,
        parity,
        [
            override("quantizer.cosine", config["codebook_l2_norm"]),
            override("quantizer.commitment_weight", config["commit_loss_beta"]),
            override("quantizer.entropy_weight", config["entropy_loss_ratio"]),
        ],
    )
    check_networks(tokenizer, config)
    assert tokenizer.options.encoder.factor == config["downsample"]
    assert tokenizer.quantizer.vocab == (config["codebook_size"],)
    inputs = parity.fill_case_inputs(case)
    run = Run(tokenizer, inputs["image"])
    trained = losses(tokenizer, run.latent)
    return {
        "encoder": channel_first(run.encoded),
        "latent": channel_first(run.latent),
        "tokens": run.indices.flatten(),
        "quantized": channel_first(run.quantized.latent),
        "reconstruction": run.decoded(run.indices),
        "decoded": run.decoded(inputs["tokens"]),
        "train_losses": torch.stack(
            [trained["codebook"], trained["commitment"], trained.get("entropy", torch.zeros(()))]
        ),
    }


def var(case: Case, parity: ModuleType) -> Stages:
    config = known(
        case["config"],
        vocab_size=4096,
        z_channels=32,
        ch=160,
        ch_mult=[1, 1, 2, 2, 4],
        num_res_blocks=2,
        beta=0.25,
        using_znorm=False,
        quant_conv_ks=3,
        quant_resi=0.5,
        share_quant_resi=4,
        v_patch_nums=[1, 2, 3, 4, 5, 6, 8, 10, 13, 16],
    )
    scales = config["v_patch_nums"]
    overrides = [*var_overrides(config, scales), override("quantizer.commitment_weight", config["beta"])]
    tokenizer = imported(case, parity, overrides)
    check_networks(tokenizer, config)
    quantizer = tokenizer.quantizer
    assert quantizer.vocab == (config["vocab_size"],)
    assert tokenizer.options.to_codes == ("convolution" if config["quant_conv_ks"] == 3 else "linear")
    assert len(quantizer.phi) == phi_convolutions(config, scales)
    inputs = parity.fill_case_inputs(case)
    encoded, tokens = watched(tokenizer.encoder, lambda: tokenizer.encode(inputs["image"]))
    given = inputs["tokens"][..., None]
    with torch.no_grad():
        total, following = None, []
        for scale, part in enumerate(given.split(quantizer.areas, 1)):
            total, later = quantizer.advance(total, quantizer.codes(part, scale), scale)
            following.append(later)
        latent = tokenizer.to_codes(encoded)
        sums = list(quantizer.partial_sums(tokens))
        raw = preclamp(tokenizer, tokens)
        return {
            "encoder": channel_first(encoded),
            "latent": channel_first(latent),
            "indices": tokens[..., 0],
            "f_hat_scale0": channel_first(sums[0]),
            "f_hat_middle": channel_first(sums[len(scales) // 2]),
            "f_hat": channel_first(sums[-1]),
            "reconstruction_preclamp": raw,
            "reconstruction": raw.clamp(-1, 1),
            "var_input_from_tokens": torch.cat(following[:-1], 1),
            "f_hat_from_tokens": channel_first(quantizer.decode(given, tuple(latent.shape[1:3]))),
            "image_from_tokens": tokenizer.decode(given),
        }


def maskgit(case: Case, parity: ModuleType) -> Stages:
    config = known(
        case["config"],
        channel_mult=[1, 1, 2, 2, 4],
        num_resolutions=5,
        hidden_channels=128,
        num_channels=3,
        num_res_blocks=2,
        resolution=256,
        z_channels=256,
        num_embeddings=1024,
        embedding_dim=256,
        commitment_cost=0.25,
        dropout=0.0,
        group_norm={"groups": 32, "eps": 1e-6},
    )
    assert config["group_norm"] == {"groups": 32, "eps": 1e-6}
    tokenizer = imported(
        case,
        parity,
        [
            override("preprocessing.image_size", config["resolution"]),
            override("quantizer.codebook_weight", config["commitment_cost"]),
        ],
    )
    check_networks(tokenizer, config, width="hidden_channels", multipliers="channel_mult")
    assert len(config["channel_mult"]) == config["num_resolutions"]
    inputs = parity.fill_case_inputs(case)
    run = Run(tokenizer, inputs["image"])
    decoded = unit(run.decoded(inputs["tokens"]))
    return {
        "hidden": channel_first(run.encoded),
        "tokens": run.indices.flatten(1),
        "quantized": channel_first(run.quantized.latent),
        "reconstruction": unit(run.reconstruction),
        "token_reconstruction": decoded,
        "token_reconstruction_clamped": decoded.clamp(0, 1),
    }


def seed_voken(case: Case, parity: ModuleType) -> Stages:
    """Open-MAGVIT2 and IBQ; stages `*_ema` are those of the averaged weights."""
    if not case["outputs"]:
        check_layout(case)
        return {}
    config = known(case["config"], ddconfig={}, n_embed=None, embed_dim=None, use_ema=False)
    network = known(
        config["ddconfig"],
        double_z=False,
        z_channels=None,
        resolution=256,
        in_channels=3,
        out_ch=3,
        ch=128,
        ch_mult=[1, 1, 2, 2, 4],
        num_res_blocks=4,
        attn_resolutions=[],
        dropout=0.0,
    )
    assert not network["double_z"]
    layout = "ibq" if case["name"].startswith("quant-ibq") else "open-magvit2"
    inputs = parity.fill_case_inputs(case)
    overrides = [override("preprocessing.image_size", inputs["image"].shape[-1])]
    found: Stages = {}
    for suffix in ("", "_ema") if config["use_ema"] else ("",):
        tokenizer = imported(case, parity, overrides, layout, ema=suffix == "_ema")
        check_networks(tokenizer, network)
        assert tokenizer.quantizer.vocab == (config["n_embed"],)
        assert tokenizer.quantizer.dim == config["embed_dim"]
        resolutions = [network["resolution"] // 2**level for level in range(len(network["ch_mult"]))]
        attends = [level for level, size in enumerate(resolutions) if size in network["attn_resolutions"]]
        assert list(tokenizer.options.encoder.attention_levels) == attends
        run = Run(tokenizer, inputs["image"])
        found |= {
            f"encoder{suffix}": channel_first(run.encoded),
            f"latent{suffix}": channel_first(run.latent),
            f"indices{suffix}": run.indices,
            f"quantized{suffix}": channel_first(run.quantized.latent),
            f"reconstruction{suffix}": run.reconstruction,
            f"decode_tokens{suffix}": run.decoded(inputs["tokens"]),
        }
    return found


def vistok(case: Case, parity: ModuleType) -> Stages:
    config = known(case["config"], encoder=None, decoder=None, quantizer=None, image_scale=1.0)
    inputs = parity.fill_case_inputs(case)
    image = inputs["image"] * config["image_scale"]
    kind, params = (config["quantizer"][key] for key in ("target", "params"))
    tokenizer = imported(
        case,
        parity,
        [
            override("preprocessing.image_size", image.shape[-1]),
            override("quantizer", vistok_quantizer(kind.removeprefix("models.quantizer."), params)),
        ],
    )
    _check_vistok_networks(tokenizer, config)
    return vistok_stages(Run(tokenizer, image), inputs["tokens"])


def vistok_stages(run: Run, tokens: Tensor) -> Stages:
    """What its tokenizer makes of the run's images and of tokens `(B, h, w)`; a sequence is a grid of one row there."""
    tokenizer, options, space = run.tokenizer, run.tokenizer.options.quantizer, tuple(run.latent.shape[1:-1])
    trained = losses(tokenizer, run.latent)
    commitment = trained.get("commitment", torch.zeros(())) / (getattr(options, "commitment_weight", 0) or 1)
    codes = trained.get("codebook", torch.zeros(())) + trained.get("double", torch.zeros(()))
    if options.name == "vq" and options.update == "ema":  # reported there, though averages move the codes
        codes = commitment
    health = CodebookHealth(tokenizer.quantizer.vocab)
    health.update(run.quantized.tokens)

    def theirs(grid: Tensor) -> Tensor:
        return grid.unsqueeze(1) if len(space) == 1 else grid

    found = {
        "encoder": channel_first(theirs(run.encoded)),
        "latent": channel_first(theirs(run.latent)),
        "indices": theirs(run.indices),
        "codes": channel_first(theirs(tokenizer.quantizer.decode(run.quantized.tokens, space).detach())),
        "reconstruction": run.reconstruction,
        "decode_tokens": run.decoded(tokens[:, 0] if len(space) == 1 else tokens),
        "loss_commit": pair(commitment),
        "loss_vq": pair(codes),
        "perplexity": pair(health.result()["perplexity"][0]),
    }
    if "entropy" in trained:
        found["loss_entropy"] = pair(trained["entropy"] / options.entropy_weight)
    return found


def vistok_quantizer(kind: str, params: dict[str, Any]) -> dict[str, Any]:
    """The quantizer's options; entropy with a weight of 1 where there is one."""
    if kind == "FiniteScalarQuantizer":
        return {"name": "fsq", "levels": known(params, levels=None)["levels"]}
    regularised = {"use_entropy_reg": False, "entropy_reg_temp": 0.01}
    if kind == "LookupFreeQuantizer":
        params = known(params, dim=None, **regularised | {"use_entropy_reg": True})
        options: dict[str, Any] = {"name": "lfq", "bits": [params["dim"]]}
    else:
        sizes = {"codebook_num": None, "codebook_dim": None}
        if kind == "SimVQQuantizer":
            params = known(params, **sizes)
            options = {"name": "simvq", "bias": True}
        elif kind == "IndexBackpropagationQuantizer":
            params = known(params, **sizes, **regularised)
            options = {"name": "ibq", "commitment_weight": 0.25, "codebook_weight": 1.0}
        else:
            assert kind == "VectorQuantizer"
            params = known(params, **sizes, **regularised, l2_norm=False, use_ema_update=False, ema_decay=0.99)
            options = {"name": "vq"}
            if params["l2_norm"]:
                options |= {"cosine": True, "unit_length": "codes"}
            if params["use_ema_update"]:
                options |= {"update": "ema", "ema_decay": params["ema_decay"], "ema_smoothing": False}
        options |= {"dim": params["codebook_dim"], "codebook_size": params["codebook_num"]}
    if "use_entropy_reg" in params:
        options |= {
            "entropy_weight": float(params["use_entropy_reg"]),
            "entropy_temperature": params["entropy_reg_temp"],
        }
    return options


def _check_vistok_networks(tokenizer: ComposedTokenizer, config: dict[str, Any]) -> None:
    for side, channels, options in (
        ("encoder", "in_channels", tokenizer.options.encoder),
        ("decoder", "out_channels", tokenizer.options.decoder),
    ):
        target, params = config[side]["target"], config[side]["params"]
        if ".simple_cnn." in target:
            params = known(params, img_channels=3, hidden_dim=256, n_resblocks=2)
            assert (options.width, options.blocks) == (params["hidden_dim"], params["n_resblocks"])
        else:
            assert ".vqgan_net." in target
            sizes = {"dim": 128, "dim_mults": [1, 1, 2, 2, 4], "num_res_blocks": 2, "dropout": 0.0, "z_channels": 256}
            params = known(params, **{channels: 3}, **sizes)
            assert list(options.widths) == [params["dim"] * multiplier for multiplier in params["dim_mults"]]
            assert options.blocks == params["num_res_blocks"] + (side == "decoder")
            assert options.latent_width == params["z_channels"]


RUNNERS = {
    "llamagen-vq-": llamagen,
    "var-vqvae-": var,
    "maskgitvq-": maskgit,
    "quant-openmagvit2-": seed_voken,
    "quant-ibq-": seed_voken,
    **{f"vistok-{kind}-": vistok for kind in ("vqgan", "vqvae", "fsqvae", "lfqvae", "simvqvae", "ibqvae")},
}
