import io

import numpy as np
import pytest
import torch
from PIL import Image

from smalti.core.data.images import GAP, grid, png_bytes, save_grid, to_uint8
from smalti.core.errors import UserError


def test_bytes_come_back_exactly():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    found = to_uint8(pixels.float() / 127.5 - 1)
    assert found.dtype == torch.uint8
    assert found.shape == (1, 16, 16, 3)
    assert all(torch.equal(found[0, :, :, channel], pixels[0, 0]) for channel in range(3))


def test_values_outside_are_clamped_and_channels_go_last():
    images = torch.tensor([-3.0, 0.0, 3.0]).view(1, 3, 1, 1)
    assert to_uint8(images).tolist() == [[[[0, 128, 255]]]]
    assert to_uint8(images).is_contiguous()


@pytest.mark.parametrize("shape", [(5, 7, 3), (5, 7)])
def test_png_keeps_every_pixel(shape):
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    for given in (image, torch.from_numpy(image)):
        with Image.open(io.BytesIO(png_bytes(given))) as read:
            np.testing.assert_array_equal(np.asarray(read), image)


@pytest.mark.parametrize("scale", [1, 3])
def test_grid_places_images_in_reading_order_on_white(scale):
    images = np.random.default_rng(0).integers(0, 250, (5, 4, 6, 3)).astype(np.uint8)
    canvas = grid(images, 3, scale)
    height, width = 4 * scale, 6 * scale
    assert canvas.shape == (2 * height + GAP, 3 * width + 2 * GAP, 3)
    seen = np.zeros(canvas.shape[:2], dtype=bool)
    for index, image in enumerate(images):
        place = np.s_[
            index // 3 * (height + GAP) : index // 3 * (height + GAP) + height,
            index % 3 * (width + GAP) : index % 3 * (width + GAP) + width,
        ]
        np.testing.assert_array_equal(canvas[place], np.kron(image, np.ones((scale, scale, 1), dtype=np.uint8)))
        seen[place] = True
    assert (canvas[~seen] == 255).all()


def test_saved_grid_is_the_grid(tmp_path):
    images = torch.randint(0, 256, (4, 3, 3, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    save_grid(tmp_path / "new" / "grid.png", images, 2)
    with Image.open(tmp_path / "new" / "grid.png") as read:
        np.testing.assert_array_equal(np.asarray(read), grid(images, 2))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["grid.png"]


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (np.zeros((2, 4, 4), np.uint8), "uint8 (2, 4, 4)"),
        (np.zeros((2, 4, 4, 3)), "float64 (2, 4, 4, 3)"),
        (np.zeros((0, 4, 4, 3), np.uint8), "uint8 (0, 4, 4, 3)"),
    ],
)
def test_other_arrays_are_no_grid(images, found):
    with pytest.raises(UserError) as error:
        grid(images, 2)
    assert str(error.value) == f"a grid needs uint8 images (N, H, W, 3), got {found}"
