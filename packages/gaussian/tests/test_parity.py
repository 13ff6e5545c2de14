"""Every backend against GaussianToken's splatting, in both precisions; `test_parity_cases` runs all stages by one."""

import sys

import pytest
import torch

from smalti.core.testing.parity import compare, fill_case_inputs, load_runners
from smalti.gaussian import rasterize_gaussians_2d

NAMES = ("means", "scales", "rotations", "features", "opacities")
SMALL = ["gaussiantoken-op-rasterize-32x32-n64-c3", "gaussiantoken-op-rasterize-32x32-n256-c8"]
LARGE = ["gaussiantoken-op-rasterize-256x256-n64-c8", "gaussiantoken-op-rasterize-256x256-n256-c3"]
# The cases were computed in float64. In float32 the original itself is off by up to 2.7e-4 of the deviation.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 5e-4}


@pytest.fixture(scope="module")
def mapped(request):
    """From the inputs of a case to Gaussians, as its runner maps them."""
    load_runners(request.path.parent / "parity", "gaussian_parity_rasterize.py")
    return sys.modules["gaussian_parity_rasterize"].mapped


@pytest.mark.parametrize("gradient", ["exact", "published"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, backend) for name in SMALL for backend in ("tiles", "numba", "reference")]
    + [(name, backend) for name in LARGE for backend in ("tiles", "numba")],
)
def test_image_and_gradients(load_case, mapped, render_with_gradients, name, dtype, backend, gradient):
    case = load_case(name)
    raw = {key: value.double() for key, value in fill_case_inputs(case).items()}
    gaussians = {key: value.to(dtype) for key, value in mapped(case["config"], raw).items()}
    height, width = case["config"]["height"], case["config"]["width"]
    got = render_with_gradients(gaussians, height, width, raw["upstream"][None], backend=backend, gradient=gradient)
    problems = {"image": compare(case["outputs"]["image"], got["image"][0], TOLERANCE[dtype])}
    stage = {"exact": "grad_exact", "published": "grad_kernel"}[gradient]
    for key in NAMES:
        expected = case["outputs"][f"{stage}.{key}"]
        problems[key] = compare(expected, got[key][0].reshape(expected["shape"]), TOLERANCE[dtype])
    assert not any(problems.values()), problems


def test_images_of_a_batch_are_rendered_alone(load_case, mapped):
    case = load_case(SMALL[1])
    raw = {key: value.double() for key, value in fill_case_inputs(case).items()}
    batch = {name: torch.cat((torch.zeros_like(value), value)) for name, value in mapped(case["config"], raw).items()}
    image = rasterize_gaussians_2d(*(batch[name] for name in NAMES), 32, 32)
    assert not image[0].any()
    assert not compare(case["outputs"]["image"], image[1], 1e-8)
