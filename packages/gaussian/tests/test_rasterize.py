"""The operator: formula, gradients, equality of the backends, degenerate input, errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti.core.errors import UserError
from smalti.gaussian import rasterize_gaussians_2d

NAMES = ("means", "scales", "rotations", "features", "opacities")
BACKENDS = ["tiles", "reference"]


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "settings_",
    [{}, {"min_alpha": 0.0, "cull_sigmas": math.inf}, {"pixel_center": 0.5, "min_alpha": 0.05, "cull_sigmas": 1.0}],
    ids=["original", "uncut", "other"],
)
def test_gradcheck(random_gaussians, backend, settings_):
    gaussians = random_gaussians(images=2, gaussians=4, channels=2, seed=3)
    leaves = [gaussians[name].requires_grad_() for name in NAMES]
    upstream = torch.randn(2, 2, 9, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(*inputs):
        return (upstream * rasterize_gaussians_2d(*inputs, 9, 40, backend=backend, **settings_)).sum()

    assert torch.autograd.gradcheck(loss, leaves, eps=1e-7, atol=1e-5)


def test_reference_has_second_derivatives(random_gaussians):
    leaves = [value.requires_grad_() for value in random_gaussians(gaussians=2, channels=1).values()]
    assert torch.autograd.gradgradcheck(
        lambda *x: rasterize_gaussians_2d(*x, 5, 6, min_alpha=0.0, cull_sigmas=math.inf, backend="reference"), leaves
    )


def test_tiles_refuse_second_derivatives(random_gaussians):
    leaves = [value.requires_grad_() for value in random_gaussians().values()]
    gradients = torch.autograd.grad(rasterize_gaussians_2d(*leaves, 8, 8).square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradients[0].sum().backward()


@settings(deadline=None, max_examples=40)
@given(
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
def test_tiles_equal_the_reference(
    random_gaussians,
    render_with_gradients,
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
    options = {"pixel_center": pixel_center, "min_alpha": min_alpha, "cull_sigmas": cull_sigmas}
    expected = render_with_gradients(inputs, height, width, backend="reference", **options)
    got = render_with_gradients(inputs, height, width, backend="tiles", **options)
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


def test_same_bytes_every_time(random_gaussians, render_with_gradients):
    gaussians = {name: value.float() for name, value in random_gaussians(images=2, gaussians=200).items()}
    first, second = (render_with_gradients(gaussians, 70, 90) for _ in range(2))
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


def test_backward_of_tiles_ignores_autocast(random_gaussians, render_with_gradients):
    gaussians = {name: value.float() for name, value in random_gaussians(gaussians=20).items()}
    plain = render_with_gradients(gaussians, 20, 40)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = render_with_gradients(gaussians, 20, 40)
    for name, value in plain.items():
        assert torch.equal(mixed[name], value), name


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
        ({"backend": "cuda"}, "backend must be one of tiles, reference, got 'cuda'"),
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
