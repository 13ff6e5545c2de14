"""How the cases of the 1-D tokenizers with pretrained starts are run on ours."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from published_parts import check_layout, imported, override, row
from safetensors.torch import save_file
from torch import Tensor

from smalti.core.backbones.titok import TiTokEncoder
from smalti.core.plugins import registry

SOURCES = {"MAE", "CLIP", "DINO_TITOK", "DINO_V2", "DEPTH_ANYTHING_V2"}
ACTIVATIONS = {"gelu (exact)": "gelu", "tanh": "tanh"}


def _check(tokenizer: torch.nn.Module, config: dict[str, Any]) -> None:
    """What the layout found must be what the case configures; nothing of the configuration is left over."""
    left = dict(config)
    encoder, decoder, quantizer = tokenizer.options.encoder, tokenizer.options.decoder, tokenizer.options.quantizer
    assert left.pop("target") == "VQModel2WithEntropyDINOLossMAEinit"
    assert left.pop("pretrained_model_name") in SOURCES
    assert encoder.reread != left.pop("pretrained")
    assert encoder.grid == (left.pop("image_size") // encoder.patch,) * 2
    assert encoder.patch == left.pop("patch_size")
    assert (encoder.width, encoder.layers, encoder.heads, encoder.mlp_width) == tuple(
        left.pop(key) for key in ("model_width", "depth", "heads", "mlp_dim")
    )
    assert encoder.tokens == left.pop("num_latent_tokens")
    assert encoder.norm_eps == left.pop("encoder_norm_eps")
    assert encoder.activation == ACTIVATIONS[left.pop("encoder_activation")]
    assert left.pop("encoder_normalize_embedding") is True
    assert quantizer.dim == left.pop("token_size")
    inner = left.pop("quantizer")
    assert inner == {
        "n_e": quantizer.codebook_size,
        "e_dim": quantizer.dim,
        "beta": quantizer.codebook_weight,
        "normalize_embedding": quantizer.cosine,
    }
    cnn = dict(left.pop("decoder"))
    channels = cnn.pop("ch")
    assert [channels * multiplier for multiplier in cnn.pop("ch_mult")] == [
        decoder.channels * multiplier for multiplier in decoder.multipliers
    ]
    side = decoder.grid[0]
    levels = len(decoder.multipliers)
    attends = {side * 2 ** (levels - 1 - level) for level in decoder.attention_levels}
    assert set(cnn.pop("attn_resolutions")) == attends
    assert cnn == {
        "double_z": False,
        "z_channels": decoder.width,
        "resolution": side * 2 ** (levels - 1),
        "patch_size": side,  # the original takes the side of the grid from this
        "model_width": decoder.width,
        "token_size": quantizer.dim,
        "num_latent_tokens": decoder.tokens,
        "in_channels": 3,
        "out_ch": 3,
        "num_res_blocks": decoder.blocks - 1,
        "dropout": 0.0,
        "normalize_embedding": False,
    }
    assert not left, f"unknown configuration {left}"


def _features(encoder: TiTokEncoder, images: Tensor) -> Tensor:
    """The whole sequence after the last norm: class token, patches, latent tokens."""
    sequence = encoder.sequence
    joined = sequence.embedding(encoder.patches(images), encoder.latents.expand(len(images), -1, -1))
    features: Tensor = sequence.norm_post(sequence.blocks(sequence.norm_pre(joined)))
    return features


def tokenizer(case: dict[str, Any], parity: ModuleType) -> dict[str, Tensor]:
    config = case["config"]
    overrides = [  # what names and shapes do not tell
        override("encoder.heads", config["heads"]),
        override("encoder.norm_eps", config["encoder_norm_eps"]),
        override("encoder.activation", ACTIVATIONS[config["encoder_activation"]]),
    ]
    if not case["outputs"]:
        _check(check_layout(case, overrides), config)
        return {}
    inputs = parity.fill_case_inputs(case)
    model = imported(case, parity, overrides)
    _check(model, config)
    with torch.no_grad():
        latent = model.to_codes(model.encoder(inputs["image"]))
        quantized = model.quantizer.train()(latent)
        model.eval()
        tokens = inputs["tokens"].unsqueeze(-1)
        codes = model.quantizer.decode(tokens, (tokens.shape[1],))
        loss = quantized.losses["commitment"] + quantized.losses["codebook"]
        return {
            "features": _features(model.encoder, inputs["image"]),
            "latent": row(latent),
            "latent_normalized": row(torch.nn.functional.normalize(latent, dim=-1)),
            "tokens": model.encode(inputs["image"]).squeeze(-1),
            "quantized": row(model.quantizer(latent).latent),
            "codebook_loss": torch.stack([loss, 2 * loss]),
            "reconstruction": model(inputs["image"]).images,
            "token_reconstruction": model.decoder(model.from_codes(codes)),
        }


def start(case: dict[str, Any], parity: ModuleType) -> dict[str, Tensor]:
    config = dict(case["config"])
    assert config.pop("pretrained_model_name") in SOURCES
    patch, image_size = config.pop("patch_size"), config.pop("image_size")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.safetensors"
        save_file(parity.fill_state_dict(case["state_dict"], case["weight_seed"]), source)
        shapes = {name: entry["shape"] for name, entry in case["state_dict"].items()}
        width = shapes["norm.weight"][0]
        options = registry().options("encoder", "pretrained-titok")(
            weights=str(source),
            start="published",
            width=width,
            layers=sum(name.endswith("norm1.weight") for name in shapes),
            heads=width // 64,
            tokens=config.pop("num_latent_tokens"),
            patch=patch,
            grid=(image_size // patch,) * 2,
            norm_eps=config.pop("norm_eps"),
        )
        assert not config, f"unknown configuration {config}"
        encoder = options.build(3).eval()
    with torch.no_grad():
        features = _features(encoder, parity.fill_case_inputs(case)["image"])
    patches = 1 + (image_size // patch) ** 2
    return {
        "patch_weight": encoder.patches.projection.weight,
        "features": features[:, :patches],
        "prompt_feature": features[:, patches : patches + 1],
    }


RUNNERS = {"sejal1d-mae": tokenizer, "sejal1d-titok": tokenizer, "sejal1d-init": start}
