"""Layouts of the VQGAN family: what they read off names and shapes is what these came from."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from smalti.core.backbones.simple_cnn import SimpleCNNDecoderOptions, SimpleCNNEncoderOptions
from smalti.core.backbones.vqgan import VQGANDecoderOptions, VQGANEncoderOptions
from smalti.core.checkpoints.importing import configured
from smalti.core.checkpoints.layouts.llamagen import LlamaGenLayout, XQGANConvolutionalLayout
from smalti.core.checkpoints.layouts.maskgit_vqgan import MaskGITVQGANLayout
from smalti.core.checkpoints.layouts.open_magvit2 import OpenMAGVIT2Layout
from smalti.core.checkpoints.layouts.taming import IBQLayout, TamingLayout, VARLayout
from smalti.core.checkpoints.layouts.vistok import VistokSimpleLayout, VistokVQGANLayout, quantizer_config
from smalti.core.checkpoints.layouts.vqgan_rules import averaged_weights
from smalti.core.checkpoints.rules import to_ours, to_published
from smalti.core.errors import UserError

PLAIN = {"attention_levels": (), "middle_attention": False, "bias": False}
UNIT = {**PLAIN, "shortcut": "output", "image_range": "unit"}
SHAPES = {
    "quantize.embedding.weight": (64, 8),
    "quant_conv.weight": (8, 8, 1, 1),
    "post_quant_conv.weight": (8, 8, 1, 1),
}
VISTOK = {"enc2code.weight": (8, 8, 1, 1), "code2dec.weight": (8, 8, 1, 1), "quantizer.codebook.weight": (64, 8)}
# Layout, what it fixes of encoder and decoder, further entries; None where the levels with attention are free.
FAMILIES = {
    "llamagen": (LlamaGenLayout(), {}, {}, SHAPES),
    "xqgan": (XQGANConvolutionalLayout(), {}, {}, {**SHAPES, "quantize.ema_vocab_hit_SV": (64,)}),
    "taming": (TamingLayout(), {}, {}, SHAPES),
    "ibq": (IBQLayout(), {}, {}, {**SHAPES, "model_ema.decay": ()}),
    "var": (VARLayout(), {}, {}, SHAPES),
    "open-magvit2": (
        OpenMAGVIT2Layout(),
        {**PLAIN, "downsampling": "symmetric", "last_kernel": 1},
        {**PLAIN, "upsampling": "shuffle", "adaptive": True},
        {},
    ),
    "maskgit": (
        MaskGITVQGANLayout(),
        {**UNIT, "downsampling": "average", "last_kernel": 1},
        UNIT,
        {"quantize.embedding.weight": (64, 8)},
    ),
    "vistok": (VistokVQGANLayout(), {"attention_eps": 1e-5}, {"attention_eps": 1e-5}, VISTOK),
}


def shapes_of(layout, encoder, decoder, further):
    """The published names and shapes of two networks."""
    with torch.device("meta"):
        networks = nn.ModuleDict({"encoder": encoder.build(3), "decoder": decoder.build(3)})
    parts = {"encoder": encoder.model_dump(), "decoder": decoder.model_dump()}
    quantizer = {"name": "multi-scale", "phi": 0, "scales": [1], "quantizer": {"codebook_size": 64}}
    quantizer = quantizer if isinstance(layout, VARLayout) else {"name": "vq"}
    config = {"options": {**parts, "quantizer": quantizer, "to_codes": "linear", "from_codes": "linear"}}
    rules = layout.rules(config)
    published, unknown = to_published(rules, networks.state_dict())
    assert unknown == []
    back, unknown = to_ours(rules, {name: tensor for name, tensor in published.items() if not layout.is_ignored(name)})
    assert unknown == []
    assert {name: tensor.shape for name, tensor in back.items()} == {
        name: tensor.shape for name, tensor in networks.state_dict().items()
    }
    return {name: tuple(tensor.shape) for name, tensor in published.items()} | further


@pytest.mark.parametrize("name", FAMILIES)
@settings(deadline=None, max_examples=5)
@given(
    multipliers=st.lists(st.integers(1, 3), min_size=2, max_size=4),
    blocks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    attention=st.sets(st.integers(0, 1)),
)
def test_options_are_read_off_the_shapes(name, multipliers, blocks, attention):
    layout, fixed_encoder, fixed_decoder, further = FAMILIES[name]
    levels = sorted(attention)
    if name == "vistok":
        levels = [len(multipliers) - 1]
    shared = {"width": 32, "multipliers": tuple(multipliers), "latent_width": 8, "attention_levels": tuple(levels)}
    if name in ("open-magvit2", "maskgit"):
        shared["middle_blocks"] = blocks[0]
    encoder = VQGANEncoderOptions(**{**shared, **fixed_encoder, "blocks": blocks[0]})
    decoder = VQGANDecoderOptions(**{**shared, **fixed_decoder, "blocks": blocks[1]})
    shapes = shapes_of(layout, encoder, decoder, further)
    assert layout.recognises(shapes)
    options = layout.config(shapes)["options"]
    found = {side: dict(options[side]) for side in ("encoder", "decoder")}
    if name == "vistok":
        found = {side: {"attention_levels": [len(multipliers) - 1], **part} for side, part in found.items()}
    assert VQGANEncoderOptions(**found["encoder"]) == encoder
    read = VQGANDecoderOptions(**found["decoder"])  # a decoder has no layer whose width is that of multiplier 1
    assert read.widths == decoder.widths
    assert read == decoder.model_copy(update={"width": read.width, "multipliers": read.multipliers})


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layout_recognises_its_own_only(name):
    layout, fixed_encoder, fixed_decoder, further = FAMILIES[name]
    small = {"width": 32, "multipliers": (1, 2), "latent_width": 8, "attention_levels": (1,)}
    encoder = VQGANEncoderOptions(**{**small, **fixed_encoder, "blocks": 1})
    shapes = shapes_of(layout, encoder, VQGANDecoderOptions(**{**small, **fixed_decoder, "blocks": 1}), further)
    # Without averaged weights IBQ's names are those of taming.
    expected = {"taming", "ibq"} if name == "taming" else {name}
    assert {other for other, (candidate, *_) in FAMILIES.items() if candidate.recognises(shapes)} == expected
    assert not VistokSimpleLayout().recognises(shapes)


def test_simple_cnn():
    layout = VistokSimpleLayout()
    encoder, decoder = SimpleCNNEncoderOptions(width=16, blocks=3), SimpleCNNDecoderOptions(width=16, blocks=1)
    shapes = shapes_of(layout, encoder, decoder, VISTOK)
    assert layout.recognises(shapes)
    options = layout.config(shapes)["options"]
    assert SimpleCNNEncoderOptions(**options["encoder"]) == encoder
    assert SimpleCNNDecoderOptions(**options["decoder"]) == decoder
    assert options["preprocessing"]["image_size"] == 64


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({}, {"name": "vq", "dim": 8, "codebook_size": 64}),
        ({"ema_sumz": (64, 8), "ema_sumn": (64,)}, {"name": "vq", "update": "ema", "ema_smoothing": False}),
        ({"codebook_proj.weight": (8, 8)}, {"name": "simvq", "bias": True}),
    ],
)
def test_vistok_quantizers_with_a_codebook(entries, expected):
    for codebook in ("codebook", "_codebook"):
        shapes = {"enc2code.weight": (8, 16, 1, 1), f"quantizer.{codebook}.weight": (64, 8)}
        found = quantizer_config(shapes | {f"quantizer.{name}": shape for name, shape in entries.items()})
        assert found.items() >= expected.items()


@pytest.mark.parametrize(
    ("channels", "expected"),
    [
        (3, {"name": "fsq", "levels": [8, 8, 8]}),
        (4, {"name": "fsq", "levels": [8, 5, 5, 5]}),
        (9, {"name": "lfq", "bits": [9]}),
        (14, {"name": "lfq", "bits": [14]}),
    ],
)
def test_vistok_quantizers_without_a_codebook(channels, expected):
    assert quantizer_config({"enc2code.weight": (channels, 16, 1, 1)}) == expected


def test_averaged_weights_have_names_without_dots():
    plain, averaged = torch.zeros(2), torch.ones(2)
    weights = {"a.b.c": plain, "a.bc": plain, "loss.x": plain, "model_ema.decay": plain}
    assert averaged_weights({"a.b": plain}) == {"a.b": plain}
    assert set(averaged_weights(weights)) == set()
    assert averaged_weights(weights | {"model_ema.abc": averaged}) == {"a.b.c": averaged, "a.bc": averaged}


@pytest.mark.parametrize("name", ["llamagen", "taming", "var", "maskgit", "open-magvit2", "vistok"])
def test_half_a_checkpoint_is_one_sentence(name):
    layout, fixed_encoder, fixed_decoder, further = FAMILIES[name]
    small = {"width": 32, "multipliers": (1, 2), "latent_width": 8, "attention_levels": (1,)}
    encoder = VQGANEncoderOptions(**{**small, **fixed_encoder, "blocks": 1})
    shapes = shapes_of(layout, encoder, VQGANDecoderOptions(**{**small, **fixed_decoder, "blocks": 1}), further)
    half = {name: shape for name, shape in shapes.items() if not name.startswith("decoder")}
    with pytest.raises(UserError, match=rf"(lack decoder|{re.escape(layout.name)})"):
        configured(layout, half)
