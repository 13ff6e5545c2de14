"""How the cases of ByteDance's 1-D tokenizers (TiTok, TA-TiTok) are run on ours."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from published_parts import channel_first, check_layout, imported, override, row, unit
from torch import Tensor, nn

from smalti.core.autoencoder import Autoencoder
from smalti.core.checkpoints.importing import export_checkpoint

# Facts of the only pixel decoder there is, which the layout finds by itself or has as published values.
PIXEL_DECODER = {
    "kind": "MaskGIT-VQGAN decoder",
    "num_embeddings": 1024,
    "embedding_dim": 256,
    "channel_mult": [1, 1, 2, 2, 4],
    "hidden_channels": 128,
    "num_channels": 3,
    "num_res_blocks": 2,
    "resolution": 256,
    "z_channels": 256,
    "dropout": 0.0,
}


def _overrides(config: dict[str, Any]) -> list[str]:
    """What names and shapes do not tell."""
    found = []
    for half in ("encoder", "decoder"):
        found.append(override(f"{half}.heads", config[half]["heads"]))
        found.append(override(f"{half}.norm_eps", config[half]["layer_norm_eps"]))
    if config["quantize_mode"] == "vq":
        found.append(override("quantizer.cosine", config["use_l2_norm"]))
        found.append(override("quantizer.commitment_weight", config["commitment_cost"]))
    return found


def _check(model: nn.Module, config: dict[str, Any]) -> None:
    """What the layout found must be what the case configures; nothing of the configuration is left over."""
    left = dict(config)
    options = model.options
    assert left.pop("class") == ("TATiTok" if options.decoder.name == "text-titok" else "TiTok")
    assert options.preprocessing.image_size == left.pop("image_size")
    for half in ("encoder", "decoder"):
        part, theirs = getattr(options, half), left.pop(half)
        assert {
            "width": part.width,
            "layers": part.layers,
            "heads": part.heads,
            "patch_size": config["image_size"] // part.grid[0],
            "mlp_ratio": part.mlp_width / part.width,
            "activation": {"gelu": "gelu (exact)"}[part.activation],
            "layer_norm_eps": part.norm_eps,
        } == theirs
        assert part.tokens == config["num_latent_tokens"]
        assert part.grid[0] == part.grid[1]
    if options.decoder.head.name == "pixels":
        assert options.decoder.head.patch == config["decoder"]["patch_size"]
    legacy, finetuned = left.pop("is_legacy"), left.pop("finetune_decoder")
    assert options.encoder.reread == legacy
    assert (
        options.decoder.head.name
        == {(True, True): "proxy", (True, False): "logits", (False, False): "pixels"}[(legacy, finetuned)]
    )
    mode = left.pop("quantize_mode")
    assert isinstance(model, Autoencoder) == {"vae": True, "vq": False}[mode]
    assert (model.width if mode == "vae" else model.quantizer.dim) == left.pop("token_size")
    if mode == "vq":
        assert model.quantizer.vocab == (left.pop("codebook_size"),)
    if options.decoder.name == "text-titok":
        assert options.decoder.text_tokens == left.pop("text_context_length")
        assert options.decoder.text_width == left.pop("text_embed_dim")
        left.pop("clustering_vq")  # nothing in evaluation
    if finetuned:
        assert left.pop("pixel_decoder") == PIXEL_DECODER
    for key in ("num_latent_tokens", "use_l2_norm", "commitment_cost"):
        left.pop(key, None)
    assert not left, f"unknown configuration {left}"


def run(case: dict[str, Any], parity: ModuleType) -> dict[str, Tensor]:
    config = case["config"]
    if not case["outputs"]:
        _check(check_layout(case, _overrides(config)), config)
        return {}
    model = imported(case, parity, _overrides(config))
    _check(model, config)
    weights = parity.fill_state_dict(case["state_dict"], case["weight_seed"])
    exported = export_checkpoint(model, "titok")
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[name], weights[name]) for name in weights)
    inputs = parity.fill_case_inputs(case)
    with torch.no_grad():
        return (_continuous if isinstance(model, Autoencoder) else _discrete)(model, config, inputs)


def _discrete(model: nn.Module, config: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    text = {"text": inputs["text"]} if "text" in inputs else {}
    latent = model.to_codes(model.encoder(inputs["image"]))
    quantized = model.quantizer(latent)
    given = model.quantizer.decode(inputs["tokens"].unsqueeze(2), (inputs["tokens"].shape[1],))
    found = {
        "latent": row(latent),
        "tokens": model.encode(inputs["image"]).transpose(1, 2),
        "quantized": row(quantized.latent),
    }
    assert torch.equal(quantized.tokens, model.encode(inputs["image"]))
    if config["is_legacy"]:
        logits = model.decoder.head.logits(model.decoder.grid(model.from_codes(quantized.latent)))
        found["decoder_logits"] = channel_first(logits)
        given_logits = model.decoder.head.logits(model.decoder.grid(model.from_codes(given)))
        found["token_decoder_logits"] = channel_first(given_logits)
    if config["finetune_decoder"]:
        found["soft_codes"] = channel_first(model.decoder.head.mixed(logits))
    if config["finetune_decoder"] or not config["is_legacy"]:
        found["reconstruction"] = unit(model(inputs["image"], **text).images)
        decoded = model.decoder(model.from_codes(given), **text)
        found["token_reconstruction"] = unit(decoded)
        clamped = model.decode(inputs["tokens"].unsqueeze(2), **text)
        torch.testing.assert_close(clamped, decoded.clamp(-1, 1))
    return found


def _continuous(model: nn.Module, config: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    del config
    text = {"text": inputs["text"]} if "text" in inputs else {}
    moments = model.to_moments(model.encoder(inputs["image"]))
    posterior = model.posterior(inputs["image"])
    mean = model.encode(inputs["image"])
    z = inputs["z"].squeeze(2).transpose(1, 2)
    decoded = model.decoder(model.from_latent(z), **text)
    clamped = model.decode(z, **text)
    torch.testing.assert_close(clamped, decoded.clamp(-1, 1))
    return {
        "moments": row(moments),
        "latent": row(moments),
        "mean": row(mean),
        "std": row(posterior.std),
        "kl": posterior.divergence(),
        "reconstruction": unit(model(inputs["image"], **text).images),
        "z_reconstruction": unit(decoded),
    }


RUNNERS = {"titok-": run}
