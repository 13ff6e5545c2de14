import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent / "toy"))

from toy_components import SignsOptions

from smalti.core.backbones.branched_vqgan import BranchedVQGANEncoderOptions
from smalti.core.backbones.positioned_transformer import PositionedTransformer
from smalti.core.backbones.vqgan import VQGANDecoderOptions
from smalti.core.errors import UserError
from smalti.core.feature_prediction import FeatureHead, FeatureHeadOptions, FeaturePredictingOptions
from smalti.core.options import Preprocessing
from smalti.core.testing import TokenizerContract
from smalti.core.tokenizer import ComposedOptions

LEVELS = {"width": 8, "multipliers": (1, 2), "groups": 4}
TINY = {
    **LEVELS,
    "blocks": 1,
    "image_size": 8,
    "adapter_depth": 2,
    "adapter_heads": 2,
    "latent_width": 12,
    "code_width": 3,
}
PARTS = {
    "preprocessing": Preprocessing(image_size=8),
    "encoder": BranchedVQGANEncoderOptions(**TINY),
    "quantizer": SignsOptions(dim=6),
    "decoder": VQGANDecoderOptions(**LEVELS, blocks=1, latent_width=6),
    "to_codes": "none",
}
HEAD = FeatureHeadOptions(first=3, channels=3, width=16, depth=1, heads=2)


class TestBranched(TokenizerContract):
    options = ComposedOptions(**PARTS)


class TestFeaturePredicting(TokenizerContract):
    options = FeaturePredictingOptions(**PARTS, feature_heads={"sem": HEAD})


def torch_layer(block, width, heads):
    """The same block by torch's own implementation."""
    layer = nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    layer.load_state_dict(
        {
            "self_attn.in_proj_weight": block.attention.qkv.weight,
            "self_attn.in_proj_bias": block.attention.qkv.bias,
            **{f"self_attn.out_proj.{name}": value for name, value in block.attention.out.state_dict().items()},
            **{f"linear1.{name}": value for name, value in block.mlp[0].state_dict().items()},
            **{f"linear2.{name}": value for name, value in block.mlp[2].state_dict().items()},
            **{f"norm1.{name}": value for name, value in block.norm1.state_dict().items()},
            **{f"norm2.{name}": value for name, value in block.norm2.state_dict().items()},
        }
    )
    return layer.double()


def test_transformer_equals_torch():
    torch.manual_seed(0)
    transformer = PositionedTransformer(6, 16, depth=3, heads=4).double()
    tokens = torch.randn(2, 6, 16, dtype=torch.float64, requires_grad=True)
    twin = transformer.norm_in(tokens + transformer.positions)
    for block in transformer.blocks:
        twin = torch_layer(block, 16, 4)(twin)
    twin = transformer.norm_out(twin)
    found = transformer(tokens)
    torch.testing.assert_close(found, twin)
    torch.testing.assert_close(*(torch.autograd.grad(out.pow(3).sum(), tokens)[0] for out in (found, twin)))


def encoder_of(**changes):
    torch.manual_seed(0)
    return BranchedVQGANEncoderOptions(**TINY | changes).build(3).eval()


def test_branches_lie_next_to_each_other_and_are_independent():
    encoder = encoder_of(branches=("vis", "sem_mid", "sem_high"))
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    before = encoder(images)
    assert before.shape == (2, 4, 4, 9)
    with torch.no_grad():
        for weight in encoder.branches["sem_mid"].parameters():
            weight.mul_(1.5)
    changed = (encoder(images) != before).flatten(0, 2).any(0)
    assert changed.tolist() == [False] * 3 + [True] * 3 + [False] * 3


def test_reading_stops_before_the_projection():
    encoder = encoder_of()
    images = torch.rand(1, 3, 8, 8) * 2 - 1
    read = encoder.read(images)
    assert {name: value.shape for name, value in read.items()} == {"vis": (1, 4, 4, 12), "sem": (1, 4, 4, 12)}
    codes = [encoder.branches[name].to_code(value) for name, value in read.items()]
    assert torch.equal(torch.cat(codes, -1), encoder(images))


def test_nothing_leads_around_the_adapter():
    encoder = encoder_of()
    with torch.no_grad():
        encoder.branches["vis"].adapter.norm_out.weight.zero_()
    one, two = (encoder(torch.rand(1, 3, 8, 8))[..., :3] for _ in range(2))
    assert torch.equal(one, two)


def test_images_of_another_area_are_refused():
    encoder = encoder_of()
    assert encoder(torch.zeros(1, 3, 4, 16)).shape == (1, 2, 8, 6)
    sentence = (
        "^an image of 8x16 cannot be encoded: it has 32 places, the adapters have learned positions for 16, "
        "those of 8x8$"
    )
    with pytest.raises(UserError, match=sentence):
        encoder(torch.zeros(1, 3, 8, 16))
    with pytest.raises(UserError, match=r"^an image of 8x9 cannot be encoded: both sides must be multiples of 2$"):
        encoder.latent_space((8, 9))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"branches": ("vis", "vis")}, "every branch needs a name of its own, got vis, vis"),
        ({"image_size": 9}, "image_size 9 must be a multiple of 2"),
        ({"adapter_heads": 3}, "width 16 cannot be divided among 3 adapter_heads"),
    ],
)
def test_options_must_agree(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        BranchedVQGANEncoderOptions(**TINY | change)


# ---- heads that predict features


def test_heads_read_their_own_channels():
    torch.manual_seed(0)
    head = FeatureHead(HEAD, 16)
    latent = torch.randn(2, 4, 4, 6, requires_grad=True)
    features = head(latent)
    assert features.shape == (2, 17, 16)
    features[:, 0].square().sum().backward()
    assert (latent.grad != 0).flatten(0, 2).any(0).tolist() == [False] * 3 + [True] * 3


def test_head_equals_its_formula():
    torch.manual_seed(0)
    head = FeatureHead(HEAD, 16)
    latent = torch.randn(1, 4, 4, 6)
    widen = head.widen
    hidden = (latent[..., 3:].reshape(1, 16, 3) @ widen[0].weight.T + widen[0].bias).clamp(min=0)
    sequence = torch.cat([head.class_embedding[None], hidden @ widen[2].weight.T + widen[2].bias], 1)
    torch.testing.assert_close(head(latent), head.transformer(sequence))


def test_features_come_with_the_reconstructions_and_reach_the_encoder():
    torch.manual_seed(0)
    tokenizer = TestFeaturePredicting.options.build().train()
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    output = tokenizer(images)
    shapes = {name: tuple(value.shape) for name, value in output.features.items()}
    assert shapes == {"latent": (2, 4, 4, 6), "sem": (2, 17, 16)}
    output.features["sem"][:, 0].pow(3).sum().backward()
    gradients = {name: branch.to_code.weight.grad for name, branch in tokenizer.encoder.branches.items()}
    assert bool((gradients["sem"] != 0).any())
    assert not bool((gradients["vis"] != 0).any())


@pytest.mark.parametrize(
    ("head", "sentence"),
    [
        ({"first": 4}, "^feature head 'sem' reads channels 4 to 6, but the quantized latent has 6$"),
        ({"heads": 3}, "^width 16 of a feature head cannot be divided among 3 heads$"),
    ],
)
def test_heads_that_do_not_fit(head, sentence):
    head = FeatureHeadOptions(**HEAD.model_dump() | head)
    with pytest.raises(UserError, match=sentence):
        FeaturePredictingOptions(**PARTS, feature_heads={"sem": head}).build()
