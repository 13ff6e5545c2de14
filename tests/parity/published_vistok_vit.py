"""Runners of visual-tokenizer-pytorch's tokenizers between transformers."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from published_cnn import Case, Run, Stages, channel_first, imported, known, losses, override, pair, vistok_quantizer
from published_layouts import check_layout
from torch import Tensor

from smalti.core.codebook_health import CodebookHealth
from smalti.core.tokenizer import ComposedTokenizer


def _checked(tokenizer: ComposedTokenizer, config: dict[str, Any]) -> None:
    """What the layout finds is what the case was built from."""
    options = tokenizer.options
    for half, channels in (("encoder", "in_channels"), ("decoder", "out_channels")):
        network = getattr(options, half)
        params = config[half]
        if network.name == "titok":
            target, params = known(params, target=None, params=None).values()
            assert target in (f"models.autoencoder.titok_net.{half.title()}", f"models.titok_net.{half.title()}")
            tokens = {"n_tokens": 32}
        else:
            tokens = {"dropout": 0.0}
        sizes = {"image_size": 256, "patch_size": 16, "embed_dim": 512, "n_heads": 8, "n_layers": 8}
        params = known(params, **{channels: 3}, **sizes, **tokens)
        assert options.preprocessing.channels == params[channels]
        assert network.grid == (params["image_size"] // params["patch_size"],) * 2
        assert options.preprocessing.image_size == params["image_size"]
        patch = network.head.patch if (network.name, half) == ("titok", "decoder") else network.patch
        found = (patch, network.width, network.heads, network.layers)
        assert found == tuple(params[key] for key in ("patch_size", "embed_dim", "n_heads", "n_layers"))
        if network.name == "titok":
            assert network.tokens == params["n_tokens"]


def run(case: Case, parity: ModuleType) -> Stages:
    config = known(case["config"], encoder=None, decoder=None, quantizer=None)
    kind, params = (config["quantizer"][key] for key in ("target", "params"))
    overrides = [
        override("quantizer", vistok_quantizer(kind.removeprefix("models.quantizer."), params)),
        *(
            override(f"{half}.heads", config[half].get("params", config[half]).get("n_heads", 8))
            for half in ("encoder", "decoder")
        ),
    ]
    if not case["outputs"]:
        _checked(check_layout(case, tuple(overrides)), config)
        return {}
    tokenizer = imported(case, parity, overrides)
    _checked(tokenizer, config)
    inputs = parity.fill_case_inputs(case)
    ran = Run(tokenizer, inputs["image"])
    trained = losses(tokenizer, ran.latent)
    health = CodebookHealth(tokenizer.quantizer.vocab)
    health.update(ran.quantized.tokens)
    space = tuple(ran.latent.shape[1:-1])
    codes = tokenizer.quantizer.decode(ran.quantized.tokens, space).detach()

    def theirs(latent: Tensor) -> Tensor:
        """A sequence is a grid of one row there."""
        return channel_first(latent.unsqueeze(1) if len(space) == 1 else latent)

    sequence = len(space) == 1
    with torch.no_grad():
        return {
            "encoder": theirs(ran.encoded),
            "latent": theirs(ran.latent),
            "indices": ran.indices.unsqueeze(1) if sequence else ran.indices,
            "codes": theirs(codes),
            "reconstruction": ran.reconstruction,
            "decode_tokens": ran.decoded(inputs["tokens"][:, 0] if sequence else inputs["tokens"]),
            "loss_commit": pair(trained["commitment"] / tokenizer.options.quantizer.commitment_weight),
            "loss_vq": pair(trained["codebook"]),
            "perplexity": pair(health.result()["perplexity"][0]),
        }


RUNNERS = {"vistok-titok-": run, "vistok-branch-vitvqgan-": run}
