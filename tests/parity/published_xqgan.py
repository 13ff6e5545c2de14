"""How the cases of XQ-GAN's tokenizers between vision transformers are run on ours."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from published_layouts import check_layout
from torch import Tensor

from smalti.core.checkpoints.importing import import_checkpoint

SIZES = {"small": (384, 12), "base": (768, 12), "large": (1024, 24)}

TRAINING = ("codebook_drop", "start_drop", "sem_loss_weight", "sem_loss_scale", "clip_norm", "dependency_loss_weight")


def _overrides(config: dict[str, Any]) -> list[str]:
    """What names and shapes do not tell."""
    quantizer = "quantizer.quantizers.0" if config["product_quant"] > 1 else "quantizer"
    if len(config["v_patch_nums"]) == 1:
        return []
    found = [f"{quantizer}.scales={config['v_patch_nums']}"]
    if config["quant_resi"]:
        found.append(f"{quantizer}.phi_ratio={abs(config['quant_resi'])}")
    if config["lfq"]:
        found.append(f"{quantizer}.scale_decay={config['scale']}")
        if not config["codebook_l2_norm"]:
            found += [f"{quantizer}.normalise=false", f"{quantizer}.quantizer.name=lfq"]
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
    share = left.pop("share_quant_resi")
    for unit in units:
        if len(config["v_patch_nums"]) > 1:
            assert len(unit.phi) == ((share or len(config["v_patch_nums"])) if config["quant_resi"] else 0)
    for key in ("abs_pos_embed", "image_size", "patch_size", "v_patch_nums", "quant_resi", "lfq", "scale"):
        left.pop(key)
    # The classes with codes always search by the cosine; the rest is training's: teachers, dropout, weights of losses.
    for key in ("codebook_l2_norm", "half_sem", "semantic_guide", "detail_guide", *TRAINING):
        left.pop(key, None)
    assert not left, f"unknown configuration {left}"


def vit(case: dict[str, Any], parity: ModuleType) -> dict[str, Tensor]:
    config = case["config"]
    if not case["outputs"]:
        _check(check_layout(case, tuple(_overrides(config))), config)
        return {}
    inputs = parity.fill_case_inputs(case)
    tokenizer = import_checkpoint(
        parity.fill_state_dict(case["state_dict"], case["weight_seed"]), overrides=_overrides(config)
    )
    _check(tokenizer, config)
    branches, side = config["product_quant"], tokenizer.options.encoder.grid
    quantizer = tokenizer.quantizer

    def grids(latent: Tensor) -> Tensor:
        """The original's latent, `(B, C, P n, 1)` or `(B, C, side, side)`, as ours, `(B, side, side, P C)`."""
        return latent.flatten(2).unflatten(2, (branches, side, side)).permute(0, 3, 4, 2, 1).flatten(3)

    with torch.no_grad():
        read = tokenizer.encoder.read(inputs["image"])
        latent = tokenizer.encoder.to_code(read).movedim(-1, 1)
        tokens = tokenizer.encode(inputs["image"])
        quantized = quantizer(grids(inputs["latent"]))
        decoded = tokenizer.decoder(tokenizer.from_codes(quantized.latent))
        given = inputs["tokens"].transpose(1, 2)
        found = {
            "encoder": read.flatten(1, 3),
            "latent": latent.flatten(2)[..., None] if branches > 1 else latent.squeeze(2),
            "image_indices": tokens.transpose(1, 2),
            "reconstruction": tokenizer.decode(tokens),
            "latent_indices": quantized.tokens.transpose(1, 2),
            "latent_f_hat": quantized.latent.movedim(-1, 1),
            "latent_decoded_preclamp": decoded,
            "latent_decoded": decoded.clamp(-1, 1),
            "image_from_tokens": tokenizer.decode(given),
        }
        if len(config["v_patch_nums"]) > 1:
            first = config["v_patch_nums"][0] ** 2
            space = (side, side)
            found["latent_f_hat_scale0"] = quantizer.decode(quantized.tokens[:, :first], space).movedim(-1, 1)
            found["f_hat_from_tokens"] = quantizer.decode(given, space).movedim(-1, 1)
    return found


RUNNERS = {"xqgan-ms": vit, "xqgan-v": vit, "xqgan-learned-positions": vit}
