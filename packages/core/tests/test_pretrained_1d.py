"""The layouts of 1-D tokenizers with pretrained and plain encoders: names, shapes, and the way back."""

import pytest
import torch

from smalti.core.backbones.titok import TiTokEncoderOptions
from smalti.core.backbones.token_cnn import TokenCNNDecoderOptions
from smalti.core.checkpoints.layouts.pretrained_1d import PlainStart, PretrainedStart
from smalti.core.checkpoints.rules import to_ours, to_published
from smalti.core.options import Preprocessing
from smalti.core.tokenizer import ComposedOptions

LAYOUTS = {
    "pretrained": (PretrainedStart(), {"class_token": "placed", "norm_pre": False, "norm_eps": 1e-6}),
    "plain": (
        PlainStart(),
        {
            "class_token": "unplaced",
            "norm_pre": False,
            "norm_eps": 1e-5,
            "qkv_bias": False,
            "activation": "tanh",
            "reread": True,
        },
    ),
}
SIZES = [
    {"tokens": 16, "layers": 3, "grid": (4, 4), "patch": 16, "multipliers": (1, 1, 2), "blocks": 3},
    {"tokens": 256, "layers": 1, "grid": (5, 5), "patch": 14, "multipliers": (1, 2), "blocks": 2},
]


def tokenizer(layout, sizes):
    torch.manual_seed(0)
    encoder = {key: sizes[key] for key in ("tokens", "layers", "grid", "patch")}
    return ComposedOptions(
        preprocessing=Preprocessing(image_size=sizes["grid"][0] * sizes["patch"]),
        encoder=TiTokEncoderOptions(width=128, heads=2, mlp_width=96, **encoder, **LAYOUTS[layout][1]),
        quantizer={"name": "signs", "dim": 4},
        decoder=TokenCNNDecoderOptions(
            width=24,
            tokens=sizes["tokens"],
            grid=sizes["grid"],
            channels=32,
            multipliers=sizes["multipliers"],
            blocks=sizes["blocks"],
            attention_levels=(len(sizes["multipliers"]) - 1,),
        ),
    ).build()


@pytest.fixture(params=[(layout, index) for layout in LAYOUTS for index in range(len(SIZES))], ids=str)
def published(request):
    """A layout, a tokenizer of ours, and its weights under the published names with those of training beside."""
    name, index = request.param
    model = tokenizer(name, SIZES[index])
    layout = LAYOUTS[name][0]
    tensors, unknown = to_published(layout.rules(model.config()), model.state_dict())
    assert not unknown
    tensors["quantize.embedding.weight"] = torch.zeros(64, 4)
    tensors |= dict.fromkeys(
        ("latent_tokens", "loss.logvar", "encoder.head.weight", "post_quant_conv.bias"), torch.ones(1)
    )
    if name == "plain":
        tensors["ln.weight"] = torch.ones(1)
    return layout, model, tensors


def test_sizes_follow_from_names_and_shapes(published):
    layout, model, tensors = published
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    others = [other for other, _ in LAYOUTS.values() if other.recognises(shapes)]
    assert others == [layout]
    options = layout.config(shapes)["options"]
    assert TiTokEncoderOptions(**options["encoder"]) == model.options.encoder
    assert TokenCNNDecoderOptions(**options["decoder"]) == model.options.decoder
    assert options["preprocessing"] == {"image_size": model.preprocessing.image_size}
    assert (options["quantizer"]["dim"], options["quantizer"]["codebook_size"]) == (4, 64)


def test_there_and_back(published):
    layout, model, tensors = published
    kept = {name: tensor for name, tensor in layout.select(tensors, ema=True).items() if not layout.is_ignored(name)}
    ours, unknown = to_ours(layout.rules(model.config()), kept)
    assert not unknown
    assert ours.pop("quantizer.codebook").shape == (64, 4)
    assert ours.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in model.state_dict().items())
