"""Ellipses lie where the Gaussians do."""

import math

import numpy as np
import pytest
import torch

from smalti.core.errors import UserError
from smalti.gaussian.drawing import draw_ellipses, draw_on_images
from smalti.gaussian.gaussians import Gaussians
from smalti.gaussian.rasterizer.rasterize import rasterize_gaussians_2d


def one(angle=0.5, scales=(18.0, 8.0)):
    return torch.tensor([[0.2, -0.3]]), torch.tensor([scales]), torch.tensor([angle])


@pytest.mark.parametrize("angle", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("sigmas", [1.0, 2.0])
def test_an_outline_is_a_level_line_of_what_is_rendered(angle, sigmas):
    means, scales, rotations = one(angle)
    drawn = draw_ellipses(means, sigmas * scales, rotations, torch.zeros(1, 3), 120, 160)
    image = rasterize_gaussians_2d(
        means[None], scales[None], rotations[None], torch.ones(1, 1, 1), torch.ones(1, 1), 120, 160, pixel_center=0.5
    )[0, 0]
    ink = torch.from_numpy((drawn != 255).any(-1).copy())
    expected = math.exp(-(sigmas**2) / 2)
    assert ink.sum() > 30
    assert image[ink].mean().item() == pytest.approx(expected, abs=0.05)
    inside = image > expected + 0.25 * (1 - expected)
    assert not (ink & inside).any()


def test_scales_are_those_of_the_grid():
    means, scales, rotations = one()
    whole = draw_ellipses(means, scales, rotations, torch.zeros(1, 3), 64, 80)
    mapped = draw_ellipses(means, scales / 4, rotations, torch.zeros(1, 3), 64, 80, grid=(16, 20))
    assert np.array_equal(whole, mapped)


def test_large_ones_hide_no_small_ones():
    means = torch.zeros(2, 2)
    scales = torch.tensor([[3.0, 3.0], [3.5, 3.5]])
    colours = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])
    drawn = draw_ellipses(means, scales, torch.zeros(2), colours, 32, 32)
    swapped = draw_ellipses(means, scales.flip(0), torch.zeros(2), colours.flip(0), 32, 32)
    assert np.array_equal(drawn, swapped)


def test_colours_are_those_of_the_image_at_the_centre():
    image = torch.full((1, 3, 8, 8), -1.0)
    image[:, 0, :, 4:] = 1.0
    means = torch.tensor([[[-0.5, 0.0], [0.5, 0.0]]])
    gaussians = Gaussians(means, torch.full((1, 2, 2), 1.0), torch.zeros(1, 2), torch.zeros(1, 2, 4), torch.ones(1, 2))
    (picture,) = draw_on_images(gaussians, image, (8, 8), (64, 64))
    assert picture.shape == (3, 64, 64)
    left, right = picture[:, :, :32].flatten(1), picture[:, :, 32:].flatten(1)
    assert left.amin(1).tolist() == [0, 0, 0]
    assert right.amin(1).tolist() == [204, 0, 0]


def test_no_gaussians_are_an_empty_picture():
    drawn = draw_ellipses(torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0), torch.zeros(0, 3), 4, 5)
    assert drawn.shape == (4, 5, 3)
    assert (drawn == 255).all()


def test_colours_of_two_channels():
    with pytest.raises(UserError, match=r"^ellipses have the colours of 1 or 3 channels, got 2$"):
        draw_ellipses(*one(), torch.zeros(1, 2), 8, 8)
