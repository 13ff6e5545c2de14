import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from smalti.core.data.augmentation import Augmentation, RandomCrop, RandomResizedCrop, RandomScaleCrop
from smalti.core.data.decode import decode, decode_augmented, decode_ten_crops
from smalti.core.data.geometry import quickly_resized, resized
from smalti.core.data.picture import UndecodableImageError
from smalti.core.options import Preprocessing


def pixels(width, height, channels=3, seed=0):
    """Smooth, with grain."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    found = np.clip(smooth + random.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(found[:, :, :channels])


@pytest.mark.parametrize("kind", ["bicubic", "bilinear"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("size", "mean"),
    [((64, 48), 0.05), ((130, 60), 0.05), ((300, 200), 0.05), ((256, 256), 0.05), ((131, 99), 0.3), ((99, 131), 0.3)],
)
def test_quick_resizing_is_a_grey_level_or_two_from_pillow(kind, channels, size, mean):
    image = pixels(130, 101, channels)
    exact, quick = (resize(image, *size, kind).astype(int) for resize in (resized, quickly_resized))
    assert exact.shape == quick.shape == (size[1], size[0], channels)
    difference = np.abs(exact - quick)
    assert difference.max() <= 3
    assert difference.mean() < mean


def test_resizing_to_the_same_size_is_nothing():
    image = pixels(20, 10)
    assert resized(image, 20, 10, "bicubic") is image
    assert quickly_resized(image, 20, 10, "bicubic") is image


def test_fits_of_torchvision(make_png):
    """Plain twins of `Resize(S)` and `CenterCrop(S)`, written down from their documentation."""
    image = pixels(75, 50)
    for fit, kind in (("bicubic-crop", Image.Resampling.BICUBIC), ("bilinear-crop", Image.Resampling.BILINEAR)):
        small = np.asarray(Image.fromarray(image).resize((int(33 * 75 / 50), 33), kind))
        left = round((49 - 33) / 2)
        expected = small[:, left : left + 33].transpose(2, 0, 1)
        assert np.array_equal(decode(make_png(image), Preprocessing(image_size=33, fit=fit)), expected)


@pytest.mark.parametrize(("width", "height"), [(9, 6), (5, 4), (3, 9), (6, 6)])
def test_native_crop_keeps_pixels_and_pads(make_png, width, height):
    image = pixels(width, height)
    found = decode(make_png(image), Preprocessing(image_size=6, fit="native-crop", background=7)).transpose(1, 2, 0)
    rows, columns = (np.arange(6) + round((side - 6) / 2) if side >= 6 else None for side in (height, width))
    if rows is None:
        rows = np.arange(6) - (6 - height) // 2
    if columns is None:
        columns = np.arange(6) - (6 - width) // 2
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            inside = 0 <= row < height and 0 <= column < width
            assert np.array_equal(found[y, x], image[row, column] if inside else [7, 7, 7])


def test_a_box_is_cut_before_anything_else(make_png):
    image = pixels(30, 20)
    part = make_png(image[4:16, 3:18])
    how = Preprocessing(image_size=6)
    assert np.array_equal(decode(make_png(image), how, (3, 4, 18, 16)), decode(part, how))
    with pytest.raises(UndecodableImageError, match=r"it has 30x20 pixels, the box \(3, 4, 31, 16\) reaches beyond"):
        decode(make_png(image), how, (3, 4, 31, 16))


def test_ten_crops_of_a_square(make_png):
    image = pixels(11, 11)
    found = decode_ten_crops(make_png(image), Preprocessing(image_size=10), crop_range=1.1)
    assert found.shape == (10, 3, 10, 10)
    for view, (top, left) in zip(found[:4], [(0, 0), (0, 1), (1, 0), (1, 1)], strict=True):
        assert np.array_equal(view, image[top : top + 10, left : left + 10].transpose(2, 0, 1))
    assert np.array_equal(found[5:], decode_ten_crops(make_png(image[:, ::-1]), Preprocessing(image_size=10))[:5])


CROPS = [RandomCrop(), RandomScaleCrop(), RandomScaleCrop(shortest=1.4, longest=2.8), RandomResizedCrop()]


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(CROPS), st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(0, 99))
def test_any_image_gives_a_square_and_a_seed_always_the_same(crop, width, height, size, seed):
    image = pixels(width, height)
    found = crop.apply(image, size, random.Random(seed))
    assert (found.shape, found.dtype) == ((size, size, 3), np.uint8)
    assert np.array_equal(crop.apply(image, size, random.Random(seed)), found)


def test_places_of_random_crops_are_uniform():
    image = np.zeros((8, 11, 1), np.uint8)
    image[0, :, 0] = np.arange(11)
    lefts = [int(RandomCrop().apply(image, 8, random.Random(seed))[0, 0, 0]) for seed in range(400)]
    assert set(lefts) == {0, 1, 2, 3}
    assert max(lefts.count(left) for left in range(4)) < 140


def test_the_short_side_is_drawn_from_whole_numbers_with_both_ends():
    sides = set()

    def noted(image, width, height, kind):
        sides.add(min(width, height))
        assert kind == "bicubic"
        return resized(image, width, height, kind)

    for seed in range(200):
        RandomScaleCrop().apply(pixels(30, 24), 16, random.Random(seed), noted)
    assert sides == set(range(16, 21))


@settings(deadline=None, max_examples=60)
@given(st.integers(8, 200), st.integers(8, 200), st.integers(0, 9999))
def test_rectangles_have_the_areas_and_ratios_asked_for(width, height, seed):
    crop = RandomResizedCrop(area=(0.2, 0.5), ratio=(0.5, 2.0))
    left, top, wide, tall = crop._rectangle(width, height, random.Random(seed))
    assert 0 <= left <= left + wide <= width
    assert 0 <= top <= top + tall <= height
    rounding = 1.5 / min(wide, tall)
    if not (0.5 <= width / height <= 2):
        return  # in very long images no rectangle may fit: then the largest in the middle is taken
    assert 0.2 * (1 - 2 * rounding) <= wide * tall / (width * height) <= 0.5 * (1 + 2 * rounding)
    assert 0.5 * (1 - 2 * rounding) <= wide / tall <= 2 * (1 + 2 * rounding)


def test_an_image_too_long_for_every_rectangle_gives_the_largest_in_the_middle():
    assert RandomResizedCrop(area=(1, 1)).apply(pixels(90, 9), 9, random.Random(0)).shape == (9, 9, 3)
    assert RandomResizedCrop(area=(1, 1))._rectangle(90, 9, random.Random(0)) == (39, 0, 12, 9)
    assert RandomResizedCrop(area=(1, 1))._rectangle(9, 90, random.Random(0)) == (0, 39, 9, 12)


def test_half_of_the_images_are_mirrored(make_png):
    image = pixels(12, 12)
    how, content = Preprocessing(image_size=12), make_png(image)
    plain = image.transpose(2, 0, 1)
    mirrored = 0
    for seed in range(200):
        found = decode_augmented(content, how, None, Augmentation(flip=True), random.Random(seed))
        assert np.array_equal(found, plain) or np.array_equal(found, plain[:, :, ::-1])
        mirrored += np.array_equal(found, plain[:, :, ::-1])
    assert 70 < mirrored < 130


def test_without_a_crop_the_tokenizers_own_fitting_is_taken(make_png):
    image = make_png(pixels(20, 14))
    how = Preprocessing(image_size=21, fit="pad")
    found = decode_augmented(image, how, None, Augmentation(), random.Random(0))
    assert np.array_equal(found, decode(image, how))


def test_options_are_checked():
    found = Augmentation.model_validate({"crop": {"name": "random-resized", "area": [0.5, 1]}, "flip": True})
    assert isinstance(found.crop, RandomResizedCrop)
    with pytest.raises(ValidationError, match=r"longest is 1\.0, below shortest, which is 1\.2"):
        RandomScaleCrop(shortest=1.2, longest=1.0)
    with pytest.raises(ValidationError, match="the smallest value comes first"):
        RandomResizedCrop(area=(0.5, 0.1))
    with pytest.raises(ValidationError, match="greater than 0"):
        RandomResizedCrop(ratio=(0, 1))
    assert math.isclose(RandomResizedCrop().ratio[1], 4 / 3)
