import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from smalti.core.data import picture
from smalti.core.data.picture import UndecodableImageError, read_picture


def coloured(width, height, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 4 + 2, width // 4 + 2, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, **how):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **how)
    return buffer.getvalue()


def by_pillow(content):
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def test_the_quick_library_is_there():
    assert picture._SIMPLEJPEG is not None


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(1, 100),
    st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]),
    st.booleans(),
)
def test_jpegs_are_read_as_pillow_reads_them_bit_for_bit(width, height, quality, subsampling, progressive):
    content = encoded(
        coloured(width, height), quality=quality, subsampling=subsampling, progressive=progressive, optimize=True
    )
    assert np.array_equal(read_picture(content, 3), by_pillow(content))


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_other_kinds_of_jpeg_are_left_to_pillow(mode):
    content = encoded(coloured(20, 12).convert(mode))
    assert np.array_equal(read_picture(content, 3), by_pillow(content))


def test_a_colour_jpeg_in_grey():
    content = encoded(coloured(20, 12))
    with Image.open(io.BytesIO(content)) as image:
        assert np.array_equal(read_picture(content, 1)[:, :, 0], np.asarray(image.convert("L")))


def test_a_cut_jpeg_is_undecodable():
    content = encoded(coloured(64, 64))
    for end in (4, 100, len(content) // 2):
        with pytest.raises(UndecodableImageError):
            read_picture(content[:end], 3)


def test_without_the_quick_library_all_is_the_same(monkeypatch):
    content = encoded(coloured(40, 30))
    expected = read_picture(content, 3)
    monkeypatch.setattr(picture, "_SIMPLEJPEG", None)
    assert np.array_equal(read_picture(content, 3), expected)


def test_pixels_can_be_written_to():
    for content in (encoded(coloured(8, 8)), encoded(coloured(8, 8).convert("L"))):
        assert read_picture(content, 3).flags.writeable


def test_a_picture_larger_than_pillow_takes_without_warning(monkeypatch):
    content = io.BytesIO()
    coloured(40, 30).save(content, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(Image, "_decompression_bomb_check", lambda size: None)  # warns, which tests take for an error
    with pytest.raises(UndecodableImageError, match="it has 40 x 30 pixels, more than 1000"):
        read_picture(content.getvalue(), 3)
