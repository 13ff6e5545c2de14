"""The operator: formula, gradients, equality of the backends, degenerate input, errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.core.errors import UserError
from smalti.gaussian import rasterize_gaussians_2d
from smalti.gaussian.rasterizer import backends
from smalti.gaussian.rasterizer.ellipses import from_scales
from smalti.gaussian.rasterizer.projection import project

NAMES = ("means", "scales", "rotations", "features", "opacities")
BACKENDS = ["tiles", "numba", "reference"]
FAST = ["tiles", "numba"]
COMPOSITING = ["sum", "over"]


def _assert_same(got, expected, tolerance):
    for name, value in expected.items():
        scale = max(value.abs().max().item(), 1.0) if value.numel() else 1.0
        torch.testing.assert_close(got[name], value, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_gaussian_follows_the_formula(backend):
    means = torch.tensor([[[0.1, -0.2]]], dtype=torch.float64)
    scales = torch.tensor([[[3.0, 1.5]]], dtype=torch.float64)
    angle, opacity = 0.4, 0.8
    rotation = torch.tensor(
        [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]], dtype=torch.float64
    )
    covariance = rotation @ torch.diag(scales[0, 0] ** 2) @ rotation.T
    offset = torch.tensor([0.5 * 24 * 1.1 - 15, 0.5 * 20 * 0.8 - 9], dtype=torch.float64)
    alpha = opacity * math.exp(-0.5 * (offset @ torch.linalg.solve(covariance, offset)).item())
    image = rasterize_gaussians_2d(
        means,
        scales,
        torch.full((1, 1), angle, dtype=torch.float64),
        torch.tensor([[[2.0, -3.0]]], dtype=torch.float64),
        torch.full((1, 1), opacity, dtype=torch.float64),
        20,
        24,
        backend=backend,
    )
    assert image.shape == (1, 2, 20, 24)
    assert image[0, :, 9, 15].tolist() == pytest.approx([2 * alpha, -3 * alpha], rel=1e-12)


def _upstream(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compositing", COMPOSITING)
@pytest.mark.parametrize(
    "settings_",
    [{}, {"min_alpha": 0.0, "cull_sigmas": math.inf}, {"pixel_center": 0.5, "min_alpha": 0.05, "cull_sigmas": 1.0}],
    ids=["original", "uncut", "other"],
)
def test_gradcheck(random_gaussians, backend, compositing, settings_):
    gaussians = random_gaussians(images=2, gaussians=4, channels=2, seed=3)
    leaves = [gaussians[name].requires_grad_() for name in NAMES]
    upstream, options = _upstream(2, 2, 9, 40), {"backend": backend, "compositing": compositing, **settings_}

    def loss(*inputs):
        return (upstream * rasterize_gaussians_2d(*inputs, 9, 40, **options)).sum()

    assert torch.autograd.gradcheck(loss, leaves, eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", ["cholesky", "covariances"])
def test_gradcheck_of_other_shapes(random_gaussians, backend, shape):
    gaussians = random_gaussians(gaussians=3, channels=2, seed=4)
    entries = torch.tensor([[[2.0, 1.5, 3.0], [3.0, -2.0, 1.5], [1.0, 0.3, 4.0]]], dtype=torch.float64)
    entries[..., 0] *= torch.tensor((1, 1, -1) if shape == "cholesky" else (1, 2, 1))
    leaves = [entries, *(gaussians[name] for name in ("means", "features", "opacities"))]
    upstream = _upstream(1, 2, 20, 18)

    def loss(entries, means, features, opacities):
        image = rasterize_gaussians_2d(
            means, None, None, features, opacities, 20, 18, min_alpha=0.0, backend=backend, **{shape: entries}
        )
        return (upstream * image).sum()

    assert loss(*leaves) != 0
    assert torch.autograd.gradcheck(loss, [leaf.requires_grad_() for leaf in leaves], eps=1e-7, atol=1e-5)


def test_the_three_shapes_are_one(random_gaussians):
    gaussians = random_gaussians(gaussians=6, largest_scale=9.0)
    means, scales, rotations, features, opacities = gaussians.values()
    cos, sin = rotations.cos(), rotations.sin()
    turn = torch.stack((torch.stack((cos, sin), -1), torch.stack((-sin, cos), -1)), -2)
    matrices = turn @ torch.diag_embed(scales.square()) @ turn.mT
    factors = torch.linalg.cholesky(matrices)
    signs = torch.tensor((-1.0, 1.0), dtype=torch.float64)  # columns of the factor may have either sign
    lower = (0, 1, 1), (0, 0, 1)
    expected = rasterize_gaussians_2d(*gaussians.values(), 30, 40)
    for shape in ({"covariances": matrices[..., *lower]}, {"cholesky": (factors * signs)[..., *lower]}):
        image = rasterize_gaussians_2d(means, None, None, features, opacities, 30, 40, **shape)
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("compositing", COMPOSITING)
def test_reference_has_second_derivatives(random_gaussians, compositing):
    leaves = [value.requires_grad_() for value in random_gaussians(gaussians=2, channels=1).values()]
    options = {"min_alpha": 0.0, "cull_sigmas": math.inf, "backend": "reference", "compositing": compositing}
    assert torch.autograd.gradgradcheck(lambda *x: rasterize_gaussians_2d(*x, 5, 6, **options), leaves)


@pytest.mark.parametrize("backend", FAST)
def test_other_backends_refuse_second_derivatives(random_gaussians, backend):
    leaves = [value.requires_grad_() for value in random_gaussians().values()]
    image = rasterize_gaussians_2d(*leaves, 8, 8, backend=backend)
    gradients = torch.autograd.grad(image.square().sum(), leaves, create_graph=True)
    with pytest.raises(UserError) as caught:
        gradients[0].sum().backward()
    assert str(caught.value) == "the rasterizer is differentiable once; backend='reference' is so any number of times"


@pytest.mark.parametrize("backend", BACKENDS)
def test_compositing_is_front_to_back(backend):
    # Four wide Gaussians of opacities ½, 2 (limited to 0.999), 0.9, 1: the third leaves less than 1e-4, so it and
    # all behind it are not drawn.
    means, wide = torch.zeros(1, 4, 2), torch.full((1, 4, 2), 1e10)
    features = torch.eye(4)[None]
    opacities = torch.tensor([[0.5, 2.0, 0.9, 1.0]])
    image = rasterize_gaussians_2d(
        means, wide, torch.zeros(1, 4), features, opacities, 5, 20, compositing="over", backend=backend
    )
    expected = torch.tensor([0.5, 0.5 * 0.999, 0.0, 0.0])
    torch.testing.assert_close(image[0], expected[:, None, None].expand(4, 5, 20))


def test_compositing_may_leave_a_little_light():
    inputs = [torch.zeros(1, 3, 2), torch.full((1, 3, 2), 1e10), torch.zeros(1, 3), torch.eye(3)[None]]
    opacities = torch.tensor([[0.99, 0.98, 0.4]])
    image = rasterize_gaussians_2d(*inputs, opacities, 4, 4, compositing="over")
    assert image[0, :, 0, 0].tolist() == pytest.approx([0.99, 0.01 * 0.98, 0.01 * 0.02 * 0.4], rel=1e-4)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("compositing", COMPOSITING)
def test_operators_pass_opcheck(random_gaussians, backend, compositing):
    means, scales, rotations, features, opacities = random_gaussians(images=2, gaussians=4, channels=2).values()
    projection = project(means, from_scales(scales, rotations), 9, 20)
    tensors = [projection.centers, projection.whitening, features, opacities]
    settings_ = (0.0, 1 / 255, compositing == "over", backend)
    image, upstream = torch.zeros(2, 2, 9, 20, dtype=torch.float64), _upstream(2, 2, 9, 20)
    backward = (*tensors, projection.boxes, *settings_, image, upstream)
    torch.library.opcheck(torch.ops.smalti.rasterize_gaussians_backward.default, backward)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    forward = (*leaves, projection.boxes, 9, 20, *settings_)
    torch.library.opcheck(torch.ops.smalti.rasterize_gaussians.default, forward)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"backend": "reference"}, marks=pytest.mark.slow),
        {"backend": "tiles", "compositing": "over"},
        {"backend": "numba", "gradient": "published"},
    ],
    ids=str,
)
def test_compiles_without_graph_breaks(random_gaussians, options):
    leaves = [value.float().requires_grad_() for value in random_gaussians(gaussians=6, channels=2).values()]
    compiled = torch.compile(
        lambda *inputs: rasterize_gaussians_2d(*inputs, 12, 20, **options), fullgraph=True, backend="aot_eager"
    )
    results = []
    for function in (compiled, lambda *inputs: rasterize_gaussians_2d(*inputs, 12, 20, **options)):
        image = function(*leaves)
        results.append([image, *torch.autograd.grad(image.square().sum(), leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_unchecked_values_that_are_not_finite_draw_nothing(random_gaussians, monkeypatch):
    gaussians = random_gaussians(gaussians=5)
    expected = rasterize_gaussians_2d(*(value[:, 4:] for value in gaussians.values()), 12, 20)
    for index, name in enumerate(("means", "scales", "rotations", "opacities")):
        gaussians[name][:, index] = (math.nan, math.inf)[index % 2]
    monkeypatch.setattr("smalti.gaussian.rasterizer.rasterize.check_values", lambda given: None)  # as on a GPU
    torch.testing.assert_close(rasterize_gaussians_2d(*gaussians.values(), 12, 20), expected)


def test_backends_by_themselves(random_gaussians, monkeypatch):
    assert backends.choose(None, torch.device("cpu")) == "numba"
    assert backends.choose(None, torch.device("meta")) == "tiles"
    monkeypatch.setattr(backends, "_MISSING", {"numba"})
    assert backends.choose(None, torch.device("cpu")) == "tiles"
    with pytest.raises(UserError) as caught:
        rasterize_gaussians_2d(*random_gaussians().values(), 8, 8, backend="numba")
    assert str(caught.value) == (
        "backend 'numba' needs numba, which is not installed: pip install smalti-gaussian[cpu]"
    )


@pytest.mark.parametrize("compositing", COMPOSITING)
def test_threads_change_no_byte(random_gaussians, render_with_gradients, compositing):
    gaussians = {name: value.float() for name, value in random_gaussians(images=2, gaussians=300).items()}
    options = {"backend": "numba", "compositing": compositing}
    alone = render_with_gradients(gaussians, 100, 90, **options)
    torch.set_num_threads(3)
    for name, value in render_with_gradients(gaussians, 100, 90, **options).items():
        assert torch.equal(value, alone[name]), name


@settings(deadline=None, max_examples=40)
@given(
    backend=st.sampled_from(FAST),
    compositing=st.sampled_from(COMPOSITING),
    images=st.integers(1, 3),
    gaussians=st.sampled_from([0, 1, 3, 20, 90]),
    channels=st.integers(1, 5),
    height=st.integers(1, 75),
    width=st.integers(1, 75),
    largest_scale=st.sampled_from([0.5, 4.0, 60.0]),
    greatest_opacity=st.sampled_from([1.0, 3.0]),
    pixel_center=st.sampled_from([0.0, 0.5]),
    min_alpha=st.sampled_from([0.0, 1 / 255, 0.2]),
    cull_sigmas=st.sampled_from([1.5, 3.0, math.inf]),
    double=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_backends_equal_the_reference(
    random_gaussians,
    render_with_gradients,
    backend,
    compositing,
    images,
    gaussians,
    channels,
    height,
    width,
    largest_scale,
    greatest_opacity,
    pixel_center,
    min_alpha,
    cull_sigmas,
    double,
    seed,
):
    inputs = random_gaussians(images, gaussians, channels, seed, largest_scale=largest_scale)
    inputs["opacities"] *= greatest_opacity
    if gaussians > 2:
        inputs["scales"][:, 0] = 0
        inputs["opacities"][:, 1] = 0
        inputs["means"][:, 2] = torch.tensor([40.0, -1.0])
    inputs = {name: value.to(torch.float64 if double else torch.float32) for name, value in inputs.items()}
    options = {
        "compositing": compositing,
        "pixel_center": pixel_center,
        "min_alpha": min_alpha,
        "cull_sigmas": cull_sigmas,
    }
    expected = render_with_gradients(inputs, height, width, backend="reference", **options)
    got = render_with_gradients(inputs, height, width, backend=backend, **options)
    assert got["image"].shape == (images, channels, height, width)
    _assert_same({"image": got["image"]}, {"image": expected.pop("image")}, 1e-12 if double else 2e-6)
    # The gradients of wide ellipses are small sums of large terms: float32 leaves them fewer digits.
    _assert_same(got, expected, 1e-11 if double else 5e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "change",
    [
        {"scales": 0.0},
        {"scales": 1e-30},
        {"scales": 1e-15},
        {"scales": 1e18},
        {"scales": 3e38},
        {"means": 1e30},
        {"means": 3e38, "scales": 3e38},
        {"opacities": 0.0},
        {"opacities": -1.0},
        {"opacities": 1e6},
    ],
    ids=str,
)
def test_degenerate_gaussians_stay_finite(random_gaussians, render_with_gradients, backend, dtype, change):
    gaussians = {name: value.to(dtype) for name, value in random_gaussians(gaussians=3).items()}
    for name, value in change.items():
        gaussians[name][:, 1] = value
    for options in ({}, {"min_alpha": 0.0, "cull_sigmas": math.inf}):
        for name, value in render_with_gradients(gaussians, 20, 40, backend=backend, **options).items():
            assert value.isfinite().all(), (name, options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropped_gaussians_draw_nothing_and_get_no_gradient(random_gaussians, render_with_gradients, backend):
    gaussians = random_gaussians(gaussians=4)
    gaussians["scales"][:, 0, 1] = 0
    gaussians["means"][:, 1] = 9
    gaussians["opacities"][:, 2] = 0.003
    got = render_with_gradients(gaussians, 16, 16, backend=backend)
    alone = {name: value[:, 3:] for name, value in gaussians.items()}
    torch.testing.assert_close(got["image"], render_with_gradients(alone, 16, 16)["image"])
    for name in NAMES:
        assert not got[name][:, :3].any(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_huge_gaussian_covers_everything_evenly(backend):
    values = ([[[0.0, 0.0]]], [[[1e18, 1e18]]], [[0.7]], [[[2.0]]], [[0.25]])
    image = rasterize_gaussians_2d(*map(torch.tensor, values), 33, 65, backend=backend)
    assert (image == 0.5).all()


def test_alpha_at_the_threshold_is_drawn():
    values = ([[[0.0, 0.0]]], [[[1e10, 1e10]]], [[0.0]], [[[1.0]]], [[0.125]])
    inputs = list(map(torch.tensor, values))
    assert (rasterize_gaussians_2d(*inputs, 40, 40, min_alpha=0.125) == 0.125).all()
    assert not rasterize_gaussians_2d(*inputs, 40, 40, min_alpha=0.1250001).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_culling_leaves_out_whole_blocks(backend):
    # Radius ceil(3 √(4 + √0.1)) = 7 around x = 10: up to 17, so two blocks of 16 columns are drawn.
    values = ([[[-0.6875, 0.0]]], [[[2.0, 2.0]]], [[0.0]], [[[1.0]]], [[1.0]])
    inputs = [torch.tensor(value, dtype=torch.float64) for value in values]
    cut = rasterize_gaussians_2d(*inputs, 16, 64, min_alpha=0.0, backend=backend)
    whole = rasterize_gaussians_2d(*inputs, 16, 64, min_alpha=0.0, cull_sigmas=math.inf, backend=backend)
    torch.testing.assert_close(cut[..., :32], whole[..., :32], rtol=0, atol=0)
    assert not cut[..., 32:].any()
    assert whole[..., 32:].any()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("compositing", COMPOSITING)
def test_same_bytes_every_time(random_gaussians, render_with_gradients, backend, compositing):
    gaussians = {name: value.float() for name, value in random_gaussians(images=2, gaussians=200).items()}
    options = {"backend": backend, "compositing": compositing}
    first, second = (render_with_gradients(gaussians, 70, 90, **options) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(random_gaussians, render_with_gradients, backend):
    leaves = [value.float().requires_grad_() for value in random_gaussians(gaussians=20).values()]
    plain = rasterize_gaussians_2d(*leaves, 20, 40, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = rasterize_gaussians_2d(*leaves, 20, 40, backend=backend)
    assert torch.equal(mixed, plain)
    expected = torch.autograd.grad(plain.square().sum(), leaves)
    for name, got, value in zip(NAMES, torch.autograd.grad(mixed.square().sum(), leaves), expected, strict=True):
        assert torch.equal(got, value), name


@pytest.mark.parametrize("backend", FAST)
def test_backward_ignores_autocast(random_gaussians, render_with_gradients, backend):
    gaussians = {name: value.float() for name, value in random_gaussians(gaussians=20).items()}
    plain = render_with_gradients(gaussians, 20, 40, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = render_with_gradients(gaussians, 20, 40, backend=backend)
    for name, value in plain.items():
        assert torch.equal(mixed[name], value), name


def test_autocast_takes_half_precision(random_gaussians):
    gaussians = {name: value.float() for name, value in random_gaussians().items()}
    gaussians["features"] = gaussians["features"].bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        image = rasterize_gaussians_2d(*gaussians.values(), 20, 40)
    assert image.dtype == torch.float32
    (gradient,) = torch.autograd.grad(image.sum(), gaussians["features"])
    assert gradient.dtype == torch.bfloat16
    assert gradient.any()


def _inputs(**changes):
    inputs = {
        "means": torch.zeros(2, 4, 2),
        "scales": torch.ones(2, 4, 2),
        "rotations": torch.zeros(2, 4),
        "features": torch.zeros(2, 4, 3),
        "opacities": torch.ones(2, 4),
        "height": 8,
        "width": 8,
    }
    return inputs | changes


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"means": torch.zeros(4, 2)}, "means must have the shape [images, gaussians, 2], got [4, 2]"),
        (
            {"scales": torch.ones(2, 4, 3)},
            "scales must have the shape [2, 4, 2] to go with the means, got [2, 4, 3]",
        ),
        (
            {"rotations": torch.zeros(2, 4, 1)},
            "rotations must have the shape [2, 4] to go with the means, got [2, 4, 1]",
        ),
        (
            {"features": torch.zeros(2, 5, 3)},
            "features must have the shape [2, 4, channels] to go with the means, got [2, 5, 3]",
        ),
        ({"opacities": torch.ones(2)}, "opacities must have the shape [2, 4] to go with the means, got [2]"),
        ({"means": torch.zeros(2, 4, 2).half()}, "means must be float32 or float64, got torch.float16"),
        (
            {"features": torch.zeros(2, 4, 3).double()},
            "features must be float32 or float64 like the means (torch.float32), got torch.float64",
        ),
        ({"opacities": torch.ones(2, 4, device="meta")}, "opacities must be on cpu like the means, got meta"),
        ({"scales": torch.full((2, 4, 2), -0.5)}, "scales must not be negative, got -0.5"),
        ({"scales": torch.full((2, 4, 2), math.nan)}, "scales must be finite, but some are NaN or infinite"),
        ({"means": torch.full((2, 4, 2), math.inf)}, "means must be finite, but some are NaN or infinite"),
        ({"height": 0}, "height of the image must be a whole number of at least 1, got 0"),
        ({"width": 8.0}, "width of the image must be a whole number of at least 1, got 8.0"),
        ({"pixel_center": math.nan}, "pixel_center must be finite, got nan"),
        ({"min_alpha": 1.5}, "min_alpha must lie in [0, 1], got 1.5"),
        ({"cull_sigmas": 0}, "cull_sigmas must be greater than 0 (math.inf turns culling off), got 0"),
        ({"backend": "cuda"}, "backend must be one of tiles, numba, triton, reference, got 'cuda'"),
        ({"compositing": "under"}, "compositing must be one of sum, over, got 'under'"),
        ({"gradient": "true"}, "gradient must be one of exact, published, got 'true'"),
        (
            {"gradient": "published", "compositing": "over"},
            "gradient='published' is that of compositing='sum'; with 'over' only 'exact' exists",
        ),
        (
            {"rotations": None},
            "give either scales and rotations, or cholesky, or covariances, and None for others: got scales",
        ),
        (
            {"cholesky": torch.ones(2, 4, 3)},
            "give either scales and rotations, or cholesky, or covariances, and None for others: got scales, "
            "rotations, cholesky",
        ),
        (
            {"scales": None, "rotations": None},
            "give either scales and rotations, or cholesky, or covariances, and None for others: got none of them",
        ),
        (
            {"scales": None, "rotations": None, "cholesky": torch.ones(2, 4, 2)},
            "cholesky must have the shape [2, 4, 3] to go with the means, got [2, 4, 2]",
        ),
        (
            {"scales": None, "rotations": None, "covariances": torch.tensor([1.0, 2.0, 3.0]).expand(2, 4, 3)},
            "covariances must be positive definite, got (xx, xy, yy) = (1.0, 2.0, 3.0)",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_errors(changes, sentence):
    with pytest.raises(UserError) as caught:
        rasterize_gaussians_2d(**_inputs(**changes))
    assert str(caught.value) == sentence


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("images", "gaussians"), [(0, 4), (2, 0)])
def test_nothing_to_draw(random_gaussians, render_with_gradients, backend, images, gaussians):
    got = render_with_gradients(random_gaussians(images, gaussians), 5, 40, backend=backend)
    assert got["image"].shape == (images, 3, 5, 40)
    assert not got["image"].any()
    assert got["means"].shape == (images, gaussians, 2)


@pytest.mark.parametrize("backend", FAST)
def test_one_pixel_and_many(random_gaussians, backend):
    means, scales, rotations, features, opacities = (
        value.float() for value in random_gaussians(gaussians=8, channels=1).values()
    )
    inputs = (means, scales, rotations, features, opacities)
    one = rasterize_gaussians_2d(*inputs, 1, 1, backend=backend)
    torch.testing.assert_close(one, rasterize_gaussians_2d(*inputs, 1, 1, backend="reference"))
    image = rasterize_gaussians_2d(*inputs, 4096, 4096, backend=backend)
    inside = [i for i in range(8) if means[0, i].abs().max() < 0.99]
    assert inside
    x, y = (2048 * (means[0, inside[0]] + 1)).int().tolist()
    drawn = image[:, :, y - 8 : y + 9, x - 8 : x + 9]
    center = 2048 * (means[:, inside[:1]] + 1) - torch.tensor((x - 8, y - 8))
    expected = rasterize_gaussians_2d(
        2 * center / 17 - 1, *(value[:, inside[:1]] for value in inputs[1:]), 17, 17, backend="reference"
    )
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-3)
