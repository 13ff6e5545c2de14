"""Runners of visual-tokenizer-pytorch's tokenizers between transformers."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from published_cnn import Run, vistok_quantizer, vistok_stages
from published_parts import Case, Stages, check_layout, imported, known, override

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
        _checked(check_layout(case, overrides), config)
        return {}
    tokenizer = imported(case, parity, overrides)
    _checked(tokenizer, config)
    inputs = parity.fill_case_inputs(case)
    return vistok_stages(Run(tokenizer, inputs["image"]), inputs["tokens"])


RUNNERS = {"vistok-titok-": run, "vistok-branch-vitvqgan-": run}
