"""The contract of tokenizers over every system that smalti covers, in small, with the quantizers that belong to it."""

import pytest
import torch

from smalti.core.contracts import Tokenizer
from smalti.core.options import TokenizerOptions
from smalti.core.plugins import registry
from smalti.core.testing import TokenizerContract

CNN = {"width": 8, "multipliers": [1, 2], "groups": 4, "blocks": 1, "latent_width": 8}
PLAIN = {"attention_levels": [], "middle_attention": False, "bias": False}
VIT = {"width": 16, "heads": 2, "mlp_width": 32}
SEQUENCE = {**VIT, "layers": 1, "grid": [4, 4]}
LATENT_GRID = {**VIT, "depth": 1, "patch": 4, "image_size": 16, "grid": 4, "layer_scale": 0.1}
del LATENT_GRID["mlp_width"]


def composed(encoder: dict, quantizer: dict, decoder: dict, **projections: str) -> dict:
    parts = {"encoder": encoder, "quantizer": quantizer, "decoder": decoder, **projections}
    return {"name": "composed", "preprocessing": {"image_size": 16}, **parts}


def vqgan(quantizer: dict, encoder: dict | None = None, decoder: dict | None = None, **projections: str) -> dict:
    return composed(
        {"name": "vqgan", **CNN, **(encoder or {})},
        quantizer,
        {"name": "vqgan", **CNN, **(decoder or {})},
        **projections,
    )


SIMPLE = {"name": "simple-cnn", "width": 16}
GRID = {"name": "vit-vqgan", **SEQUENCE, "patch": 4}
HEAD = {"first": 4, "channels": 4, "width": 16, "depth": 1, "heads": 2}
NO_PROJECTIONS = {"to_codes": "none", "from_codes": "none"}
VQ = {"name": "vq", "dim": 4, "codebook_size": 32, "cosine": True}
MULTI_SCALE = {
    "name": "multi-scale",
    "scales": [1, 2, 4],
    "phi": 2,
    "quantizer": {"name": "bsq", "bits": [4]},
    "normalise": True,
}
BRANCHED = {
    **{key: value for key, value in CNN.items() if key != "latent_width"},
    "name": "branched-vqgan",
    "image_size": 16,
    "adapter_depth": 1,
    "adapter_heads": 2,
    "latent_width": 8,
    "code_width": 4,
}
FACTORIZED = {"name": "factorized", "quantizers": [VQ], "branches": 2, "disentanglement_weight": 0.1}

STACK = {"layers": 1, "heads": 2, "points": 2}
EMBED = {"gaussians": 12, "width": 32, "encoder": STACK, "attention": STACK}


def gaussians(quantizer: dict, **embed: object) -> dict:
    parts = vqgan(
        quantizer,
        {**PLAIN, "downsampling": "symmetric", "last_kernel": 1},
        {**PLAIN, "upsampling": "shuffle", "adaptive": True, "latent_width": 4},
    )
    return parts | {"name": "gaussiantoken", "embed": {**EMBED, **embed}, "geometry_bits": 16}


SYSTEMS = {
    "vq-vae": composed(SIMPLE, {"name": "fsq", "levels": [5, 5, 5]}, SIMPLE),
    "llamagen": vqgan(VQ),
    "ibq": vqgan({"name": "ibq", "dim": 6, "codebook_size": 32}),
    "var": vqgan(
        {"name": "multi-scale", "scales": [1, 2, 4, 8], "quantizer": {"name": "vq", "dim": 8, "codebook_size": 32}},
        to_codes="convolution",
        from_codes="convolution",
    ),
    "open-magvit2": vqgan(
        {"name": "lfq", "bits": [8]},
        {**PLAIN, "downsampling": "symmetric", "last_kernel": 1},
        {**PLAIN, "upsampling": "shuffle", "adaptive": True},
        **NO_PROJECTIONS,
    ),
    "maskgit-vqgan": vqgan(
        {"name": "vq", "dim": 8, "codebook_size": 32},
        {**PLAIN, "shortcut": "output", "image_range": "unit", "downsampling": "average", "last_kernel": 1},
        {**PLAIN, "shortcut": "output", "image_range": "unit"},
        **NO_PROJECTIONS,
    ),
    "fqgan": composed(BRANCHED, FACTORIZED, {"name": "vqgan", **CNN}, to_codes="none"),
    "fqgan-with-feature-heads": composed(BRANCHED, FACTORIZED, {"name": "vqgan", **CNN}, to_codes="none")
    | {"name": "feature-predicting", "feature_heads": {"sem": HEAD}},
    "xq-gan": composed(
        {"name": "latent-grid-vit", **LATENT_GRID, "branches": 2, "code_width": 4},
        {"name": "product", "quantizers": [MULTI_SCALE], "branches": 2},
        {"name": "latent-grid-vit", **LATENT_GRID},
        to_codes="none",
    ),
    "vit-vqgan": composed(GRID, VQ, GRID),
    "titok": composed(
        {"name": "titok", **SEQUENCE, "tokens": 6, "patch": 4, "reread": True, "image_range": "unit"},
        VQ,
        {
            "name": "titok",
            **SEQUENCE,
            "tokens": 6,
            "head": {"name": "proxy", "codes": 32, "decoder": {"name": "vqgan", **CNN, "multipliers": [1, 1, 2]}},
        },
    ),
    "1d-after-pretrained": composed(
        {"name": "titok", **SEQUENCE, "tokens": 6, "patch": 4},
        VQ,
        {"name": "token-cnn", "width": 16, "tokens": 6, "grid": [4, 4], "channels": 32, "multipliers": [1, 1, 1]},
    ),
    "gaussiantoken": gaussians(
        {**VQ, "cosine": False, "estimator": "rotation"}, operations=["attention", "feed-forward", "refine"]
    ),
    "gaussiantoken-residual": gaussians(
        {"name": "residual", "quantizers": [{**VQ, "cosine": False}], "depth": 2},
        operations=["sparse-convolution", "attention", "feed-forward", "refine"] * 2,
        share=True,
        opacity=True,
        learn_features=True,
    ),
    "ta-titok": {
        "name": "composed",
        "preprocessing": {"image_size": 16},
        "encoder": {"name": "titok", **SEQUENCE, "tokens": 6, "patch": 4},
        "quantizer": VQ,
        "decoder": {
            "name": "text-titok",
            **SEQUENCE,
            "tokens": 6,
            "head": {"name": "pixels", "patch": 4},
            "text_tokens": 5,
            "text_width": 6,
        },
    },
}  # fmt: skip


def options(system: str) -> TokenizerOptions:
    config = SYSTEMS[system]
    return registry().options("tokenizer", config["name"]).model_validate(config)


def _contract(system: str) -> type:
    text = torch.randn(8, 5, 6, generator=torch.Generator().manual_seed(3))
    context = staticmethod(lambda batch: {"text": text[:1].expand(batch, -1, -1)} if system == "ta-titok" else {})
    name = "Test" + "".join(part.title() for part in system.split("-"))
    return type(name, (TokenizerContract,), {"options": options(system), "context": context})


for _system in SYSTEMS:
    _class = _contract(_system)
    globals()[_class.__name__] = _class


@pytest.mark.parametrize("kind", ["tokenizer", "encoder", "decoder"])
def test_nothing_that_is_registered_is_left_out(kind: str) -> None:
    def names(config: object) -> set[str]:
        if isinstance(config, dict):
            inner = set().union(*map(names, config.values()))
            return inner | ({config["name"]} if "name" in config else set())
        return set()

    # These start from weights of others, and are what `titok` is afterwards, or load another tokenizer,
    # or stand in tests of their own in core.
    pretrained = {"pretrained-titok", "timm", "transformers"}
    elsewhere = {"cnn", "example-patches", "published"}
    covered = set().union(*(names(config) for config in SYSTEMS.values()))
    assert set(registry().names(kind)) <= covered | pretrained | elsewhere


@pytest.mark.parametrize("system", ["llamagen", "var", "fqgan", "maskgit-vqgan"])
def test_other_sizes_than_the_trained_one(system: str) -> None:
    torch.manual_seed(0)
    tokenizer = options(system).build().eval()
    images = torch.rand(1, 3, 8, 32) * 2 - 1
    if system == "var":
        images = torch.rand(1, 3, 16, 16) * 2 - 1
    layout = tokenizer.layout((images.shape[2], images.shape[3]))
    tokens = tokenizer.encode(images)
    assert isinstance(tokenizer, Tokenizer)
    assert tokens.shape[1] == layout.positions
    assert tokenizer.decode(tokens, layout).shape == images.shape
