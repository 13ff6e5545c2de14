"""How the cases of XQ-GAN's tokenizers are run on ours."""

from __future__ import annotations

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
    phi_convolutions,
    preclamp,
)
from torch import Tensor

from smalti.core.tokenizer import ComposedTokenizer

SIZES = {"small": (384, 12), "base": (768, 12), "large": (1024, 24)}

TRAINING = ("codebook_drop", "start_drop", "sem_loss_weight", "sem_loss_scale", "clip_norm", "dependency_loss_weight")


def xqgan_overrides(config: dict[str, Any]) -> list[str]:
    """What names and shapes do not tell."""
    quantizer = "quantizer.quantizers.0" if config["product_quant"] > 1 else "quantizer"
    if len(config["v_patch_nums"]) == 1:
        return []
    found = [override(f"{quantizer}.scales", config["v_patch_nums"])]
    if config["quant_resi"]:
        found.append(override(f"{quantizer}.phi_ratio", abs(config["quant_resi"])))
    if config["lfq"]:
        found.append(override(f"{quantizer}.scale_decay", config["scale"]))
        if not config["codebook_l2_norm"]:
            found += [override(f"{quantizer}.normalise", False), override(f"{quantizer}.quantizer.name", "lfq")]
    return found


def _check(tokenizer: torch.nn.Module, config: dict[str, Any]) -> None:
    """What the layout found must be what the case configures; nothing of the configuration is left over."""
    left = dict(config)
    encoder, decoder = tokenizer.options.encoder, tokenizer.options.decoder
    for options, model in ((encoder, left.pop("encoder_model")), (decoder, left.pop("decoder_model"))):
        family, size, patch, *rest = model.split("_")
        assert (family, patch, rest) == ("vit", "patch14", ["dinov2.lvd142m"]), model
        assert (options.width, options.depth) == SIZES[size]
        assert (options.image_size, options.patch) == (config["image_size"], config["patch_size"])
        assert options.positions == ("shared" if config["abs_pos_embed"] else "learned")
    assert encoder.grid**2 == left.pop("num_latent_tokens")
    assert encoder.branches == left.pop("product_quant")
    assert encoder.code_width == left.pop("codebook_embed_dim")
    assert set(tokenizer.quantizer.vocab) == {left.pop("codebook_size")}
    assert (left.pop("enc_type"), left.pop("dec_type")) == ("dinov2", "dinov2")
    units = [tokenizer.quantizer] if config["product_quant"] == 1 else list(tokenizer.quantizer.units)
    for unit in units:
        if len(config["v_patch_nums"]) > 1:
            assert len(unit.phi) == phi_convolutions(config, config["v_patch_nums"])
    for key in ("abs_pos_embed", "image_size", "patch_size", "v_patch_nums"):
        left.pop(key)
    for key in ("quant_resi", "share_quant_resi", "lfq", "scale"):
        left.pop(key)
    # The classes with codes always search by the cosine; the rest is training's: teachers, dropout, weights of losses.
    for key in ("codebook_l2_norm", "half_sem", "semantic_guide", "detail_guide", *TRAINING):
        left.pop(key, None)
    assert not left, f"unknown configuration {left}"


def vit(case: Case, parity: ModuleType) -> Stages:
    """Tokenizers between vision transformers."""
    config = case["config"]
    if not case["outputs"]:
        _check(check_layout(case, xqgan_overrides(config)), config)
        return {}
    inputs = parity.fill_case_inputs(case)
    tokenizer = imported(case, parity, xqgan_overrides(config))
    _check(tokenizer, config)
    branches, side = config["product_quant"], tokenizer.options.encoder.grid
    # The original's latent is `(B, C, P n, 1)` or `(B, C, side, side)`, ours `(B, side, side, P C)`.
    grids = inputs["latent"].flatten(2).unflatten(2, (branches, side, side)).permute(0, 3, 4, 2, 1).flatten(3)
    with torch.no_grad():
        read = tokenizer.encoder.read(inputs["image"])
        latent = channel_first(tokenizer.encoder.to_code(read))
        return {
            "encoder": read.flatten(1, 3),
            "latent": latent.flatten(2)[..., None] if branches > 1 else latent.squeeze(2),
            **_quantized(tokenizer, inputs, grids, config["v_patch_nums"]),
        }


def cnn(case: Case, parity: ModuleType) -> Stages:
    """The one between LlamaGen's convolutional networks."""
    config = known(
        case["config"],
        codebook_size=16384,
        codebook_embed_dim=8,
        codebook_l2_norm=True,
        v_patch_nums=[1, 2, 3, 4, 5, 6, 8, 10, 13, 16],
        enc_type="cnn",
        dec_type="cnn",
        encoder_model=None,  # of a vision transformer, which is not there
        decoder_model=None,
        image_size=256,
        patch_size=16,
        num_latent_tokens=256,
        abs_pos_embed=False,
        product_quant=1,
        share_quant_resi=4,
        quant_resi=0.5,
        half_sem=True,
        lfq=False,
        scale=1.0,
        semantic_guide="none",
        detail_guide="none",
        encoder_ch_mult=[1, 1, 2, 2, 4],
        decoder_ch_mult=[1, 1, 2, 2, 4],
        z_channels=256,
    )
    assert (config["enc_type"], config["dec_type"], config["product_quant"]) == ("cnn", "cnn", 1)
    assert config["semantic_guide"] == config["detail_guide"] == "none"
    size = override("preprocessing.image_size", config["image_size"])
    tokenizer = imported(case, parity, [size, *xqgan_overrides(config)])
    assert list(tokenizer.options.encoder.multipliers) == config["encoder_ch_mult"]
    assert list(tokenizer.options.decoder.multipliers) == config["decoder_ch_mult"]
    assert tokenizer.encoder.width == config["z_channels"]
    assert tokenizer.quantizer.vocab == (config["codebook_size"],)
    inputs = parity.fill_case_inputs(case)
    with torch.no_grad():
        encoded = tokenizer.encoder(inputs["image"])
        return {
            "encoder": channel_first(encoded),
            "latent": channel_first(tokenizer.to_codes(encoded)),
            **_quantized(tokenizer, inputs, inputs["latent"].movedim(1, -1), config["v_patch_nums"]),
        }


def _quantized(tokenizer: ComposedTokenizer, inputs: dict[str, Tensor], latent: Tensor, scales: list[int]) -> Stages:
    """Stages of the case's image, latent `(B, h, w, D)` and tokens."""
    quantizer, space = tokenizer.quantizer, tuple(latent.shape[1:3])
    tokens, quantized, given = tokenizer.encode(inputs["image"]), quantizer(latent), inputs["tokens"].transpose(1, 2)
    decoded = preclamp(tokenizer, quantized.tokens)
    return {
        "image_indices": tokens.transpose(1, 2),
        "reconstruction": tokenizer.decode(tokens),
        "latent_indices": quantized.tokens.transpose(1, 2),
        "latent_f_hat": channel_first(quantized.latent),
        "latent_f_hat_scale0": channel_first(quantizer.decode(quantized.tokens[:, : scales[0] ** 2], space)),
        "latent_decoded_preclamp": decoded,
        "latent_decoded": decoded.clamp(-1, 1),
        "f_hat_from_tokens": channel_first(quantizer.decode(given, space)),
        "image_from_tokens": tokenizer.decode(given),
    }


RUNNERS = {"xqgan-cnn": cnn, "xqgan-ms": vit, "xqgan-v": vit, "xqgan-learned-positions": vit}
