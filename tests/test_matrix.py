"""Every kind of tokenizer with every generator: both learn, draw and decode, or say why not.

`python tests/test_matrix.py` writes the page docs/matrix.md.
"""

from functools import cache
from pathlib import Path

import pytest
import torch

from smalti.core.contracts import check_tokens
from smalti.core.errors import UserError
from smalti.core.plugins import registry
from smalti.core.sampling_settings import SamplingSettings

PAGE = Path(__file__).parents[1] / "docs" / "matrix.md"
INTRODUCTION = """# Tokenizers and generators

Which generator takes the tokens of which tokenizer, in small: `tests/test_matrix.py` trains every pair for a few
updates, samples and decodes, or checks the sentence with which the generator refuses, and writes this page.

"""
IMAGE = {"preprocessing": {"image_size": 16}}
CNN = {"name": "cnn", "widths": [8, 8], "groups": 4, "blocks": 1}
VQGAN = {"name": "vqgan", "width": 8, "multipliers": [1, 2], "groups": 4, "blocks": 1, "latent_width": 8}
TITOK = {"name": "titok", "width": 16, "heads": 2, "mlp_width": 32, "layers": 1, "grid": [4, 4], "tokens": 6}
STACK = {"layers": 1, "heads": 2, "points": 2}
VQ = {"name": "vq", "dim": 4, "codebook_size": 32}
SCALES = {"name": "multi-scale", "scales": [1, 2, 4], "phi": 2, "quantizer": VQ}
PRODUCT = {"name": "product", "branches": 2}
BRANCHED = {
    "name": "branched-vqgan",
    "width": 8,
    "multipliers": [1, 2],
    "groups": 4,
    "blocks": 1,
    "image_size": 16,
    "adapter_depth": 1,
    "adapter_heads": 2,
    "latent_width": 8,
    "code_width": 4,
}
FEATURE_HEADS = {"sem": {"first": 4, "channels": 4, "width": 16, "depth": 1, "heads": 2}}


def convolutional(quantizer: dict) -> dict:
    """A tokenizer with a latent of 4 x 4."""
    return {"name": "composed", **IMAGE, "encoder": CNN, "quantizer": quantizer, "decoder": CNN}


TOKENIZERS = {
    "VQ (VQGAN, LlamaGen)": convolutional({**VQ, "cosine": True}),
    "SimVQ": convolutional({"name": "simvq", "dim": 4, "codebook_size": 32}),
    "IBQ": convolutional({"name": "ibq", "dim": 4, "codebook_size": 32}),
    "Gumbel": convolutional({"name": "gumbel", "dim": 4, "codebook_size": 32}),
    "FSQ": convolutional({"name": "fsq", "levels": [5, 5]}),
    "LFQ (MAGVIT-v2)": convolutional({"name": "lfq", "bits": [5]}),
    "LFQ in groups (Open-MAGVIT2)": convolutional({"name": "lfq", "bits": [2, 3]}),
    "BSQ": convolutional({"name": "bsq", "bits": [5]}),
    "residual (RQ-VAE)": convolutional({"name": "residual", "quantizers": [VQ], "depth": 2}),
    "product (XQ-GAN)": convolutional({**PRODUCT, "quantizers": [VQ]}),
    "factorized (FQGAN)": {
        "name": "feature-predicting",
        **IMAGE,
        "encoder": BRANCHED,
        "quantizer": {"name": "factorized", "quantizers": [VQ], "branches": 2},
        "decoder": VQGAN,
        "to_codes": "none",
        "feature_heads": FEATURE_HEADS,
    },
    "multi-scale (VAR)": convolutional(SCALES),
    "product of multi-scale (ImageFolder)": convolutional({**PRODUCT, "quantizers": [SCALES]}),
    "1-D (TiTok)": {
        "name": "composed",
        **IMAGE,
        "encoder": {**TITOK, "patch": 4},
        "quantizer": VQ,
        "decoder": {**TITOK, "head": {"name": "pixels", "patch": 4}},
    },
    "Gaussians (GaussianToken)": {
        "name": "gaussiantoken",
        **IMAGE,
        "encoder": CNN,
        "embed": {"gaussians": 9, "width": 32, "encoder": STACK, "attention": STACK},
        "quantizer": {**VQ, "dim": 8},
        "decoder": CNN,
        "geometry_bits": 5,
    },
}
PLAIN = {"layers": 2, "dim": 16, "heads": 2}
GENERATORS = {
    "ar": {**PLAIN, "ffn_multiple": 8},
    "far": {**PLAIN, "ffn_multiple": 8, "inner_layers": 1},
    "maskgit": {**PLAIN, "ffn_dim": 32, "steps": 3},
    "rar": {**PLAIN, "ffn_dim": 32},
    "var": {**PLAIN, "gate_start": 1.0},
}
# Loads any of the others; a plugin of the examples, with plain VQ.
ELSEWHERE = {"published", "example-patches"}


@cache
def tokenizer_of(family):
    config = TOKENIZERS[family]
    torch.manual_seed(0)
    return registry().options("tokenizer", config["name"]).model_validate(config).build().eval()


def generator_options(name, layout):
    """Options that take the layout, with `flatten` where that is needed, or the sentence of why there are none."""
    kind = registry().options("generator", name)
    plain = kind.model_validate(GENERATORS[name])
    if plain.supports(layout) is not None and "flatten" in kind.model_fields:
        flat = plain.model_copy(update={"flatten": True})
        if flat.supports(layout) is None:
            return flat
    return plain.supports(layout) or plain


def page():
    """The matrix as Markdown."""
    reasons: list[str] = []
    rows = [["tokenizer", "tokens in the test", *GENERATORS], ["---", "---", *(":---:" for _ in GENERATORS)]]
    for family in TOKENIZERS:
        layout = tokenizer_of(family).layout()
        cells = []
        for name in GENERATORS:
            found = generator_options(name, layout)
            if isinstance(found, str):
                reasons += [found] if found not in reasons else []
                cells.append(f"no ({reasons.index(found) + 1})")
            else:
                cells.append("`flatten`" if getattr(found, "flatten", False) else "yes")
        rows.append([family, str(layout), *cells])
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    listed = "".join(f"{number}. {reason}\n" for number, reason in enumerate(reasons, 1))
    flat = "`flatten`: with that option of the generator the streams of a position stand one after the other.\n"
    return f"{INTRODUCTION}{table}\n{flat}\n{listed}"


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("family", TOKENIZERS)
def test_a_pair_learns_draws_and_decodes_or_says_why_not(family, name):
    tokenizer = tokenizer_of(family)
    layout, options = tokenizer.layout(), generator_options(name, tokenizer.layout())
    if isinstance(options, str):
        with pytest.raises(UserError) as raised:
            registry().options("generator", name).model_validate(GENERATORS[name]).build(layout, 2)
        assert str(raised.value) == f"generator {name!r} cannot take the layout {layout}: {options}"
        return
    torch.manual_seed(1)
    images, labels = torch.rand(6, 3, 16, 16) * 2 - 1, torch.tensor([0, 1] * 3)
    tokens = tokenizer.encode(images)
    generator = options.build(layout, 2)
    generator.attach(tokenizer)
    before = {key: weight.clone() for key, weight in generator.named_parameters()}
    optimizer = torch.optim.AdamW(generator.parameters(), lr=3e-3)
    for step in range(3):
        generator.begin_step(step)
        terms = generator.loss(tokens, labels)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
    assert len(terms) == (1 if layout.streams == 1 else layout.streams)
    assert all(bool(torch.isfinite(term)) for term in terms.values())
    learned = {key for key, weight in generator.named_parameters() if not torch.equal(weight, before[key])}
    assert any("transformer" in key for key in learned)
    drawn = generator.eval().sample(labels[:2], SamplingSettings(guidance_scale=1.5, seed=3))
    check_tokens(drawn, layout.vocab)
    decoded = tokenizer.decode(drawn, layout)
    assert decoded.shape == (2, 3, 16, 16)
    assert bool(torch.isfinite(decoded).all())


def test_nothing_that_is_registered_is_left_out():
    assert set(registry().names("generator")) == set(GENERATORS)
    tokenizers = {config["name"] for config in TOKENIZERS.values()}
    assert set(registry().names("tokenizer")) <= tokenizers | ELSEWHERE


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == page(), "docs/matrix.md is stale: run `python tests/test_matrix.py`"


if __name__ == "__main__":
    PAGE.write_text(page())
