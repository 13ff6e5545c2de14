import io
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from smalti.core.data.decode import decode, decode_whole
from smalti.core.data.picture import UndecodableImageError
from smalti.core.errors import UserError
from smalti.core.options import Preprocessing

RANDOM = np.random.Generator(np.random.PCG64(0))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(*shape: int) -> np.ndarray:
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def test_pad_keeps_the_pixels_in_the_middle(make_png):
    image = pixels(3, 4)
    padded = decode(make_png(image), Preprocessing(image_size=7, channels=1, fit="pad", background=9))
    assert (padded.shape, padded.dtype) == ((1, 7, 7), np.uint8)
    assert np.array_equal(padded[0, 2:5, 1:5], image)
    border = np.ones((7, 7), bool)
    border[2:5, 1:5] = False
    assert (padded[0][border] == 9).all()


def test_pad_of_colour_and_of_the_exact_size(make_png):
    image = pixels(5, 5, 3)
    assert np.array_equal(decode(make_png(image), Preprocessing(image_size=5, fit="pad")), image.transpose(2, 0, 1))
    wider = decode(make_png(image), Preprocessing(image_size=6, fit="pad", background=200))
    assert (wider[:, 5] == 200).all()


def test_pad_refuses_a_larger_image(make_png):
    sentence = "an image of 5x4 pixels does not fit into image_size 4: choose a larger one, or fit: center-crop"
    with pytest.raises(UserError, match=re.escape(sentence)) as error:
        decode(make_png(pixels(4, 5)), Preprocessing(image_size=4, fit="pad"))
    assert not isinstance(error.value, UndecodableImageError)


def test_center_crop_halves_with_a_box_filter_and_cuts_the_centre(make_png):
    image = pixels(16, 24)
    halved = image.astype(int)
    for _ in range(2):  # Pillow rounds after each axis
        halved = (halved[:, ::2] + halved[:, 1::2] + 1) // 2
        halved = (halved[::2] + halved[1::2] + 1) // 2
    found = decode(make_png(image), Preprocessing(image_size=4, channels=1))
    assert np.array_equal(found[0], halved[:, 1:5])


def test_center_crop_enlarges_and_shrinks_bicubic(make_png):
    for height, width in ((3, 5), (7, 7), (9, 30)):
        image = Image.fromarray(pixels(height, width))
        scale = 5 / min(height, width)
        resized = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
        left, top = (resized.width - 5) // 2, (resized.height - 5) // 2
        expected = np.asarray(resized)[top : top + 5, left : left + 5]
        found = decode(encoded(image), Preprocessing(image_size=5, channels=1))
        assert np.array_equal(found[0], expected)


def test_grey_and_colour_are_converted(make_png):
    grey, colour = pixels(4, 4), pixels(4, 4, 3)
    options = Preprocessing(image_size=4)
    assert np.array_equal(decode(make_png(grey), options), np.stack([grey] * 3))
    luma = np.asarray(Image.fromarray(colour).convert("L"))
    assert np.array_equal(decode(make_png(colour), Preprocessing(image_size=4, channels=1))[0], luma)


def test_uncommon_modes(make_png):
    colour = Image.fromarray(pixels(4, 4, 3))
    options = Preprocessing(image_size=4)
    for mode in ("RGBA", "LA", "P", "CMYK", "1"):
        image = colour.convert(mode)
        content = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
        assert np.array_equal(decode(content, options), np.asarray(image.convert("RGB")).transpose(2, 0, 1))
    palette = colour.convert("P")
    assert decode(encoded(palette, transparency=bytes(range(256))), options).shape == (3, 4, 4)
    deep = RANDOM.integers(0, 65536, (4, 4), dtype=np.uint16)
    for kind in ("PNG", "TIFF", "PPM"):
        assert np.array_equal(decode(encoded(Image.fromarray(deep), kind), options)[0], deep >> 8)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_other_formats(kind):
    assert decode(encoded(Image.new("RGB", (8, 8), (250, 0, 0)), kind), Preprocessing(image_size=8))[0].min() > 240


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_bytes_that_are_no_image(content):
    with pytest.raises(UndecodableImageError, match=r"cannot identify image file|Truncated"):
        decode(content, Preprocessing(image_size=4))


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_damaged_bytes_decode_or_are_undecodable_and_nothing_else(make_png, data):
    content = make_png(np.arange(64, dtype=np.uint8).reshape(8, 8))
    if data.draw(st.booleans()):
        content = encoded(Image.open(io.BytesIO(content)), "JPEG")
    damaged = bytearray(content[: data.draw(st.integers(0, len(content)))])
    for _ in range(data.draw(st.integers(0, 3))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = decode(bytes(damaged), Preprocessing(image_size=8, channels=1))
    except UndecodableImageError as error:
        assert str(error)  # noqa: PT017
    else:
        assert (found.shape, found.dtype) == ((1, 8, 8), np.uint8)


def test_a_png_without_all_its_pixels_is_undecodable(make_png):
    content = make_png(pixels(8, 8))
    options = Preprocessing(image_size=8, channels=1)
    whole = decode(content, options)
    pixels_end = content.index(b"IEND") - 4 - 4 - 4  # before length, checksum, and zlib's own checksum
    for end in range(len(content)):
        try:
            assert np.array_equal(decode(content[:end], options), whole)
        except UndecodableImageError:
            continue
        assert end >= pixels_end


def test_a_whole_image_keeps_its_size(make_png):
    image = pixels(3, 5, 3)
    assert np.array_equal(decode_whole(make_png(image), 3), image.transpose(2, 0, 1))
    assert decode_whole(make_png(image), 1).shape == (1, 3, 5)
    with pytest.raises(UndecodableImageError):
        decode_whole(b"no image", 3)


@pytest.mark.parametrize("fit", ["center-crop", "bicubic-crop", "bilinear-crop"])
def test_a_line_of_pixels_is_not_resized_to_gigabytes(make_png, fit):
    content = make_png(np.zeros((1, 9000), np.uint8))
    with pytest.raises(UndecodableImageError, match="it would be resized to 2304000 x 256 pixels, more than 268435456"):
        decode(content, Preprocessing(image_size=256, fit=fit))
    assert decode(content, Preprocessing(image_size=8, fit=fit)).shape == (3, 8, 8)
