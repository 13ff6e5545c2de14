"""What makes Gaussians of a feature map: against plain twins, within ranges, and by names of published files."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from smalti.core.checkpoints.rules import to_ours, to_published
from smalti.core.errors import UserError
from smalti.gaussian.gaussians import Gaussians
from smalti.gaussian.gaussiantoken.checkpoint import GaussianTokenLayout, embed_config, embed_rules
from smalti.gaussian.gaussiantoken.embed import GaussianEmbedOptions
from smalti.gaussian.gaussiantoken.falling_bound import FallingBound
from smalti.gaussian.gaussiantoken.geometry import dequantized, quantized, unit
from smalti.gaussian.gaussiantoken.lifter import Lifter
from smalti.gaussian.gaussiantoken.sparse_convolution import SparseConvolution, SparseConvolutionOptions

STACK = {"layers": 1, "heads": 2, "points": 2}
SMALL = {"gaussians": 7, "width": 32, "encoder": STACK, "attention": STACK}


def options(**changes):
    return GaussianEmbedOptions.model_validate({**SMALL, **changes})


def embed(**changes):
    torch.manual_seed(0)
    return options(**changes).build(inputs=5, features=3)


@pytest.fixture
def features():
    return torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(1))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 16), st.floats(0, 1))
def test_geometry_is_off_by_half_a_cell_at_most(bits, value):
    geometry = torch.full((1, 1, 5), value)
    tokens = quantized(geometry, bits)
    again = dequantized(tokens, bits)
    assert 0 <= tokens.min() <= tokens.max() < 2**bits
    assert (again - geometry).abs().max() <= 0.5 / 2**bits + 1e-7
    assert torch.equal(quantized(again, bits), tokens)


def test_the_unit_interval_has_a_margin():
    values = torch.tensor([-1e9, -9.21024, 0.0, 9.21024, 1e9])
    torch.testing.assert_close(unit(values), torch.tensor([1e-4, 1e-4, 0.5, 0.9999, 0.9999]), atol=1e-8, rtol=1e-3)


def test_gaussians_are_drawn_larger_on_a_larger_map():
    gaussians = Gaussians(
        torch.zeros(1, 1, 2), torch.full((1, 1, 2), 3.0), torch.zeros(1, 1), torch.ones(1, 1, 1), torch.ones(1, 1)
    )
    small = gaussians.rasterize(8, 8, cull_sigmas=math.inf, min_alpha=0.0)
    large = gaussians.enlarged(2).rasterize(16, 16, cull_sigmas=math.inf, min_alpha=0.0)
    torch.testing.assert_close(large[..., ::2, ::2], small)
    assert torch.equal(gaussians.carrying(torch.zeros(1, 1, 1)).rasterize(8, 8), torch.zeros(1, 1, 8, 8))


def test_sparse_convolution_sums_over_occupied_cells():
    torch.manual_seed(0)
    height, width, gaussians = 5, 7, 30
    layer = SparseConvolution(4, SparseConvolutionOptions(kernel=3)).double()
    features = torch.randn(2, gaussians, 4, dtype=torch.float64, requires_grad=True)
    centres = torch.rand(2, gaussians, 2, dtype=torch.float64)
    found = layer(features, centres, height, width)
    expected = torch.zeros_like(found)
    for image in range(2):
        cells = [(int(y * height), int(x * width)) for x, y in centres[image].tolist()]
        mean = {cell: features[image, [own == cell for own in cells]].mean(0) for cell in cells}
        assert len(mean) < gaussians  # some share a cell
        for number, (row, column) in enumerate(cells):
            for (other_row, other_column), value in mean.items():
                down, across = other_row - row + 1, other_column - column + 1
                if 0 <= down < 3 and 0 <= across < 3:
                    expected[image, number] += layer.conv.weight[:, :, down, across] @ value
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(found)
    (gradient,) = torch.autograd.grad(found, features, upstream, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, features, upstream)[0])
    torch.testing.assert_close(layer(features[:1], centres[:1], height, width), found[:1])


def test_positions_are_waves_of_the_middles_of_places():
    positions = Lifter(3, 32).positions(2, 3)
    assert positions.shape == (6, 32)
    for place in range(6):
        down, across = (place // 3 + 0.5) / (2 + 1e-6), (place % 3 + 0.5) / (3 + 1e-6)
        for channel in range(32):
            angle = 2 * math.pi * (down if channel < 16 else across) / 10_000 ** (2 * (channel % 16 // 2) / 16)
            wave = math.sin(angle) if channel % 2 == 0 else math.cos(angle)
            assert positions[place, channel].item() == pytest.approx(wave, abs=1e-5)


def test_learned_positions_end_somewhere():
    lifter = Lifter(3, 32, "learned")
    positions = lifter.positions(2, 3).view(2, 3, 32)
    assert torch.equal(positions[1, 2], torch.cat([lifter.columns.weight[2], lifter.rows.weight[1]]))
    with pytest.raises(UserError, match=r"^learned positions reach 100 rows and columns, not 101 x 3$"):
        lifter.positions(101, 3)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"opacity": True, "positions": "learned", "moved": 4, "learn_features": True, "centres": [-0.9, 1.0]},
        {"attention": {**STACK, "shortcut": "add"}, "feed_forward": {"linear": 3, "norm_in": False, "norm_out": True}},
        {
            "operations": ["sparse-convolution", "attention", "feed-forward", "refine"],
            "sparse_convolution": {"kernel": 3, "projected": True},
        },
        {"feed_forward": {"shortcut": False}, "share": True, "learn_anchors": False},
    ],
)
def test_gaussians_lie_in_their_ranges(features, changes):
    module = embed(**changes).train()
    gaussians, geometry = module(features)
    left, right = module.options.centres
    assert geometry.shape == (2, 7, module.options.numbers)
    assert 0 < geometry.min() < geometry.max() < 1
    assert left <= gaussians.means.min() <= gaussians.means.max() <= right
    assert 0.1 <= gaussians.scales.min() <= gaussians.scales.max() <= 4.0
    assert 0 <= gaussians.rotations.min() <= gaussians.rotations.max() <= math.pi
    assert (gaussians.opacities == 1).all() != module.options.opacity
    drawn = gaussians.rasterize(4, 6, min_alpha=0.0)
    drawn.square().sum().backward()
    assert all(weight.grad is not None for weight in module.parameters())
    assert torch.equal(module.gaussians(geometry, gaussians.features).means, gaussians.means)


def test_everything_is_float32_under_autocast(features):
    module = embed().eval()
    exact = module(features)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(features).geometry, exact.geometry)


def test_the_largest_scale_falls_in_training_only(features):
    module = embed()
    module.eval()(features)
    assert module.limit.bound == 4.0
    module.train()(features)
    assert 3.99 < module.limit.bound < 4.0
    assert module.limit.mean != (0.1 + 4.0) / 2


def test_shared_operations_are_one():
    apart, shared = embed(), embed(share=True)
    assert len({*map(id, apart.operations)}) == 9
    assert [*map(id, shared.operations)] == [*map(id, shared.operations[:3])] * 3
    assert apart.state_dict().keys() == shared.state_dict().keys()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"operations": ["attention", "feed-forward"]}, "the last operation must be refine, got feed-forward"),
        ({"operations": ["attention", "refine"]}, "refine takes features of width 32, but they are concatenated to 64"),
        (
            {"operations": ["feed-forward", "refine"]},
            "operations need attention, nothing else looks at the feature map",
        ),
        ({"encoder": {"heads": 5}}, "width 32 cannot be divided among 5 heads"),
        ({"moved": 38}, "moved is 38, but an anchor has 37 entries"),
        ({"centres": [1, -1]}, re.escape("centres must be a range, got (1.0, -1.0)")),
        ({"final_scale": 5}, re.escape("final_scale must lie within scales (0.1, 4.0), got 5.0")),
        ({"sparse_convolution": {"kernel": 4}}, "kernel must be odd, got 4"),
    ],
)
def test_impossible_options(changes, sentence):
    with pytest.raises(ValidationError, match=sentence):
        options(**changes)


def test_a_falling_bound_goes_on_from_its_state():
    bound = FallingBound(4.0, 3.0, lowest=0.1)
    for update in range(200):
        bound.update(torch.tensor(3.0 + math.sin(update)))
        if update == 99:
            state = {name: tensor.clone() for name, tensor in bound.state_dict().items()}
    again = FallingBound(4.0, 3.0, lowest=0.1)
    again.load_state_dict(state)
    for update in range(100, 200):
        again.update(torch.tensor(3.0 + math.sin(update)))
    assert torch.equal(again.bound, bound.bound)
    assert 3.0 < bound.bound < 4.0
    for _ in range(2000):
        bound.update(torch.tensor(4.0))
    assert bound.bound == 3.0


@settings(deadline=None, max_examples=10)
@given(
    operations=st.lists(
        st.sampled_from([("attention", "feed-forward"), ("sparse-convolution",), ("feed-forward",), ("refine",)]),
        max_size=4,
    ),
    attention=st.sampled_from(["concatenate", "add"]),
    feed_forward=st.fixed_dictionaries(
        {"linear": st.integers(2, 3), "norm_in": st.booleans(), "norm_out": st.booleans(), "shortcut": st.booleans()}
    ),
    heads=st.sampled_from([1, 2, 4]),
    opacity=st.booleans(),
    positions=st.sampled_from(["sine", "learned"]),
)
def test_options_are_read_off_published_names(operations, attention, feed_forward, heads, opacity, positions):
    order = ["attention", "feed-forward", *(name for part in operations for name in part), "refine"]
    if attention == "concatenate" and order.count("feed-forward") != order.count("attention"):
        order = ["attention", "feed-forward", "refine"]  # their inputs have one width in published files
    stack = {"layers": 2, "heads": heads, "points": 3}
    written = options(
        operations=order,
        encoder={**stack, "layers": 1},
        attention={**stack, "shortcut": attention},
        feed_forward=feed_forward,
        opacity=opacity,
        positions=positions,
    )
    with torch.device("meta"):
        module = written.build(5, 3)
        weights = module.state_dict()
    rules = embed_rules(written.model_dump(mode="json"), "there.", "here.")
    published, unknown = to_published(rules, {f"here.{name}": tensor for name, tensor in weights.items()})
    assert unknown == []
    read = embed_config({name: tuple(tensor.shape) for name, tensor in published.items()}, "there.")
    again = GaussianEmbedOptions.model_validate(read)
    with torch.device("meta"):
        rebuilt = again.build(5, 3).state_dict()
    assert {name: tensor.shape for name, tensor in rebuilt.items()} == {
        name: tensor.shape for name, tensor in weights.items()
    }
    assert again.operations == written.operations
    assert again.encoder == written.encoder
    ours, unknown = to_ours(rules, published)
    assert unknown == []
    assert {name.removeprefix("here."): tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in weights.items()
    }


def test_an_unknown_operation_is_named():
    shapes = {"layers.0.mystery.weight": (3,), "gaussian_lifter.instance_feature": (4, 32)}
    with pytest.raises(KeyError, match=re.escape("layers.0.layers.11.scale")):
        embed_config({**shapes, "gaussian_lifter.anchor": (4, 37)}, "")
    assert not GaussianTokenLayout().recognises(shapes)
