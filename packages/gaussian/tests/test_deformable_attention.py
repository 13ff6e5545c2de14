"""Deformable attention: the definition, gradients, both CPU forms, degenerate input, errors, and the module."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.core.errors import UserError
from smalti.gaussian.attention import deformable as deformable_attention
from smalti.gaussian.attention.deformable import multi_scale_deformable_attention
from smalti.gaussian.attention.module import DeformableAttention
from smalti.gaussian.attention.torch_forms import sample_grids, sum_in_bags

SHAPES = [(3, 4), (1, 2)]


def _inputs(batch=2, queries=3, heads=2, dim=3, shapes=SHAPES, points=2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64).to(dtype)

    value = 2 * uniform(batch, sum(height * width for height, width in shapes), heads, dim) - 1
    locations = 1.6 * uniform(batch, queries, heads, len(shapes), points, 2) - 0.3
    return value, locations, uniform(*locations.shape[:-1])


def _by_definition(value, shapes, locations, weights):
    """Every sample by hand, one neighbour after the other."""
    batch, queries, heads, levels, points = weights.shape
    output = torch.zeros(batch, queries, heads, value.shape[3], dtype=value.dtype)
    for b, q, m, level, p in torch.cartesian_prod(*map(torch.arange, (batch, queries, heads, levels, points))).tolist():
        height, width = shapes[level]
        start = sum(h * w for h, w in shapes[:level])
        x, y = (locations[b, q, m, level, p] * torch.tensor([width, height]) - 0.5).tolist()
        for i in (math.floor(y), math.floor(y) + 1):
            for j in (math.floor(x), math.floor(x) + 1):
                if 0 <= i < height and 0 <= j < width:
                    share = (1 - abs(y - i)) * (1 - abs(x - j)) * weights[b, q, m, level, p]
                    output[b, q, m] += share * value[b, start + i * width + j, m]
    return output.flatten(2)


@pytest.mark.parametrize("form", [multi_scale_deformable_attention, sample_grids, sum_in_bags])
def test_it_follows_the_definition(form):
    value, locations, weights = _inputs()
    expected = _by_definition(value, SHAPES, locations, weights)
    torch.testing.assert_close(form(value, SHAPES, locations, weights), expected)


def test_gradcheck():
    value, locations, weights = (x.requires_grad_() for x in _inputs(batch=1, queries=2))
    assert torch.autograd.gradcheck(
        lambda *inputs: multi_scale_deformable_attention(inputs[0], SHAPES, *inputs[1:]), (value, locations, weights)
    )


@settings(deadline=None, max_examples=30)
@given(
    batch=st.integers(0, 2),
    queries=st.integers(0, 5),
    heads=st.integers(1, 3),
    dim=st.integers(1, 9),
    shapes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3),
    points=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_bags_equal_grids(batch, queries, heads, dim, shapes, points, dtype, seed):
    value, locations, weights = _inputs(batch, queries, heads, dim, shapes, points, seed, dtype)
    expected = sample_grids(value, shapes, locations, weights)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(sum_in_bags(value, shapes, locations, weights), expected, rtol=0, atol=tolerance)


def test_without_gradients_it_takes_bags_and_with_them_grids(monkeypatch):
    value, locations, weights = _inputs()
    monkeypatch.setattr(deformable_attention, "sum_in_bags", lambda *_: "bags")
    monkeypatch.setattr(deformable_attention, "sample_grids", lambda *_: "grids")
    assert multi_scale_deformable_attention(value, SHAPES, locations, weights) == "bags"
    assert multi_scale_deformable_attention(value, SHAPES, locations.requires_grad_(), weights) == "grids"
    with torch.no_grad():
        assert multi_scale_deformable_attention(value, SHAPES, locations, weights) == "bags"


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("place", [math.nan, math.inf, -math.inf, 1e30, -3e38, -0.5, 1.5])
def test_locations_outside_or_not_finite_sample_nothing(place, gradients):
    value, locations, weights = _inputs(batch=1, queries=1, shapes=[(2, 1)], points=1, dtype=torch.float32)
    locations = locations.clone()
    locations[:, :, 0, :, :, 0] = place
    leaves = [x.requires_grad_(gradients) for x in (value, locations, weights)]
    output = multi_scale_deformable_attention(leaves[0], [(2, 1)], *leaves[1:])
    assert not output[..., :3].any()
    assert output[..., 3:].any()
    if gradients:
        grads = torch.autograd.grad(output.sum(), leaves)
        assert all(grad.isfinite().all() for grad in grads)
        assert not grads[1][:, :, 0].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_it_runs_in_float32(dtype, autocast):
    half = [x.to(dtype) for x in _inputs()]
    expected = multi_scale_deformable_attention(half[0].float(), SHAPES, *(x.float() for x in half[1:]))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = multi_scale_deformable_attention(half[0], SHAPES, *half[1:])
    assert output.dtype == torch.float32
    assert torch.equal(output, expected)


def test_same_bytes_every_time():
    value, locations, weights = (x.float().requires_grad_() for x in _inputs(queries=50))
    runs = []
    for _ in range(2):
        output = multi_scale_deformable_attention(value, SHAPES, locations, weights)
        runs.append((output, *torch.autograd.grad(output.square().sum(), (value, locations, weights))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"value": torch.zeros(2, 14, 6)}, r"^value must have the shape \(batch, positions, heads, width\), got "),
        ({"shapes": []}, r"^shapes must give the height and width, each at least 1, of every level, got \[\]$"),
        ({"shapes": [(3, 4), (0, 2)]}, r"^shapes must give the height and width"),
        ({"shapes": [(3, 4), (1, 3)]}, r"^the positions of value must be those of the levels .*, got 14$"),
        (
            {"locations": torch.zeros(2, 3, 2, 1, 2, 2)},
            r"^locations must have the shape \(2, queries, 2, 2, points, 2\)",
        ),
        ({"weights": torch.zeros(2, 3, 1, 2, 2)}, r"^weights must have the shape \(2, queries, 2, 2, points\), got "),
        ({"weights": torch.zeros(2, 4, 2, 2, 2)}, r"^locations and weights must have as many queries and points, got "),
        ({"weights": torch.zeros(2, 3, 2, 2, 2).int()}, r"^weights must be floats on cpu, got torch\.int32 on cpu$"),
        ({"weights": torch.zeros(2, 3, 2, 2, 2, device="meta")}, r"^weights must be floats on cpu, got .* on meta$"),
    ],
)
def test_mistakes(change, sentence):
    inputs = dict(zip(("value", "locations", "weights"), _inputs(), strict=True)) | {"shapes": SHAPES}
    with pytest.raises(UserError, match=sentence):
        multi_scale_deformable_attention(**inputs | change)


@pytest.fixture
def module():
    torch.manual_seed(0)
    return DeformableAttention(8, heads=2, levels=2, points=3)


def _reads(module, boxes=False, references=None):
    generator = torch.Generator().manual_seed(1)
    query, source = torch.randn(1, 4, 8, generator=generator), torch.randn(1, 14, 8, generator=generator)
    if references is None:
        references = torch.rand(1, 4, 4 if boxes else 2, generator=generator)
    return module(query, references, source, SHAPES)


def test_a_new_module_looks_along_rays(module):
    # Two heads look to the right and to the left, in whole pixels; all points count alike.
    offsets = module.sampling_offsets.bias.view(2, 2, 3, 2)
    expected = torch.tensor([[1.0, 0], [2, 0], [3, 0]])
    torch.testing.assert_close(offsets, torch.stack((expected, -expected))[:, None].expand(-1, 2, -1, -1))
    locations = module._locations(torch.randn(1, 1, 8), torch.full((1, 1, 2), 0.5), SHAPES)
    torch.testing.assert_close(locations[0, 0, 0, 0, :, 0], 0.5 + torch.arange(4.0) / 4)
    torch.testing.assert_close(locations[0, 0, 1, 1, :, 0], 0.5 - torch.arange(4.0) / 2)
    boxes = module._locations(torch.randn(1, 1, 8), torch.tensor([[[0.5, 0.5, 0.2, 0.4]]]), SHAPES)
    torch.testing.assert_close(boxes[0, 0, 0, 0, :, 0], 0.5 + torch.arange(4.0) / 8 * 0.2)
    torch.testing.assert_close(boxes[..., 1], torch.full((1, 1, 2, 2, 4), 0.5))


def test_the_fixed_point_never_learns_and_counts(module):
    assert "fixed_offsets" not in dict(module.named_parameters())
    before = _reads(module)
    module.load_state_dict(module.state_dict() | {"fixed_offsets": torch.tensor([[0.4, -1.0]])})
    assert not torch.equal(_reads(module), before)


@pytest.mark.parametrize("boxes", [False, True])
def test_every_parameter_learns(module, boxes):
    output = _reads(module, boxes)
    assert output.shape == (1, 4, 8)
    # Whole offsets lie where the gradient to them may be 0 by chance.
    output.square().sum().backward()
    assert all(parameter.grad.any() for parameter in module.parameters())


def test_the_module_runs_in_float32_under_autocast(module):
    expected = _reads(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(_reads(module), expected)
    with torch.no_grad():
        torch.testing.assert_close(_reads(module), expected)
    assert _reads(module.double()).dtype == torch.float64


@pytest.mark.slow
def test_the_module_compiles_whole(module):
    expected = _reads(module)
    expected.sum().backward()
    gradients = [parameter.grad for parameter in module.parameters()]
    module.zero_grad(set_to_none=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    output = _reads(compiled)
    output.sum().backward()
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close([parameter.grad for parameter in module.parameters()], gradients)
    with torch.no_grad():
        torch.testing.assert_close(_reads(compiled), expected)


def test_mistakes_with_the_module(module):
    with pytest.raises(UserError, match=r"^references must be points \(1, 4, 2\) or boxes \(1, 4, 4\) to go with the "):
        _reads(module, references=torch.rand(1, 4, 3))
    with pytest.raises(UserError, match=r"^this attention reads 2 levels, got 1 shapes$"):
        module(torch.rand(1, 4, 8), torch.rand(1, 4, 2), torch.rand(1, 12, 8), [(3, 4)])
    with pytest.raises(UserError, match=r"^deformable attention needs a width that its heads divide, at least one "):
        DeformableAttention(8, heads=3)
