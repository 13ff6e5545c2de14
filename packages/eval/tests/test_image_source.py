import io
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from smalti.core.errors import UserError
from smalti.core.options import Preprocessing
from smalti.eval.image_source import stored_images
from smalti.eval.npz_images import NpzImages

COLOUR = np.random.default_rng(0).integers(0, 256, (7, 6, 5, 3)).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Seven colour images of one size, the last one in a folder below."""
    place = tmp_path / "images"
    (place / "z").mkdir(parents=True)
    for index, image in enumerate(COLOUR):
        Image.fromarray(image).save(place / ("z" if index == 6 else "") / f"{index}.png")
    return place


@pytest.fixture
def shard(folder, tmp_path):
    path = tmp_path / "images.tar"
    with tarfile.open(path, "w") as tar:
        for index in range(7):
            content = next(folder.rglob(f"{index}.png")).read_bytes()
            info = tarfile.TarInfo(f"{index}.png")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "images.npz"
    np.savez(path, COLOUR)
    return path


@pytest.fixture
def compressed(tmp_path):
    path = tmp_path / "compressed.npz"
    np.savez_compressed(path, COLOUR)
    return path


def everything(source, size, world_size=1):
    """All images by place, from all processes."""
    found = {}
    for rank in range(world_size):
        for batch in source.batches(size, rank, world_size):
            assert len(batch.images) <= size
            found |= dict(zip(batch.indices.tolist(), batch.images.numpy(), strict=True))
    return np.stack([found[place] for place in range(len(source))])


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("size", [1, 3, 64])
@pytest.mark.parametrize("kind", ["folder", "shard", "archive", "compressed"])
def test_images_come_in_order_whoever_reads_them(kind, size, world_size, request):
    source = stored_images(str(request.getfixturevalue(kind)))
    assert len(source) == 7
    np.testing.assert_array_equal(everything(source, size, world_size), COLOUR)


def test_count_takes_the_first(folder, archive, compressed):
    for path in (folder, archive, compressed):
        source = stored_images(str(path), count=4)
        assert len(source) == 4
        np.testing.assert_array_equal(everything(source, 3), COLOUR[:4])


def test_images_that_are_not_plain_colour(tmp_path):
    grey = np.arange(20, dtype=np.uint8).reshape(4, 5)
    Image.fromarray(grey).save(tmp_path / "a.png")
    Image.fromarray((grey.astype(np.uint16) << 8) + 255).save(tmp_path / "b.png")
    alpha = np.dstack([grey, grey, grey, 255 - grey])
    Image.fromarray(alpha, "RGBA").save(tmp_path / "c.png")
    np.testing.assert_array_equal(everything(stored_images(str(tmp_path)), 8), np.stack([np.dstack([grey] * 3)] * 3))


def test_images_of_other_sizes_make_batches_of_their_own(tmp_path):
    for index, side in enumerate((4, 4, 6, 4)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{index}.png")
    batches = list(stored_images(str(tmp_path)).batches(4, 0, 1))
    assert [(tuple(batch.images.shape), batch.indices.tolist()) for batch in batches] == [
        ((2, 4, 4, 3), [0, 1]),
        ((1, 6, 6, 3), [2]),
        ((1, 4, 4, 3), [3]),
    ]
    preprocessing = Preprocessing(image_size=4)
    (batch,) = stored_images(str(tmp_path), preprocessing).batches(4, 0, 1)
    assert batch.images.shape == (4, 4, 4, 3)


def test_jpegs_are_counted(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.jpg")
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    (batch,) = stored_images(str(tmp_path)).batches(4, 0, 1)
    assert batch.jpegs == 1


def test_a_broken_image_is_named(folder):
    (folder / "3.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"^image 3.png of .*images cannot be read: cannot identify image file$"):
        everything(stored_images(str(folder)), 2)


def test_what_is_no_source_says_what_would_be(tmp_path):
    accepted = "expected a folder of images, tar shards, or an .npz file of ADM's layout"
    for name, known in (("missing", "does not exist"), ("text.txt", "is a file")):
        (tmp_path / "text.txt").write_text("")
        with pytest.raises(UserError) as error:
            stored_images(str(tmp_path / name))
        assert str(error.value) == f"{tmp_path / name} {known}, {accepted}"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as error:
        stored_images(str(tmp_path / "empty"))
    assert str(error.value) == f"{tmp_path / 'empty'} holds no image, {accepted}"


def test_an_archive_of_another_size_than_the_protocols_is_refused(archive):
    with pytest.raises(UserError) as error:
        stored_images(str(archive), Preprocessing(image_size=4))
    assert str(error.value) == f"{archive} holds images of 5 x 6 pixels, the protocol wants 4 x 4"


def test_other_arrays_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, COLOUR / 255)
    with pytest.raises(UserError) as error:
        NpzImages(path)
    assert str(error.value) == f"{path}: images are arr_0 uint8 (N, H, W, 3), but it is float64 (7, 6, 5, 3)"
    np.savez(path, images=COLOUR)
    with pytest.raises(UserError, match=r"x.npz has no array arr_0$"):
        NpzImages(path)


def test_stored_images_are_read_where_they_lie(archive, compressed):
    """So that processes which share them skip what belongs to others."""
    offset = NpzImages(archive)._offset
    assert archive.read_bytes()[offset : offset + COLOUR.nbytes] == COLOUR.tobytes()
    assert NpzImages(compressed)._offset is None


def test_an_archive_that_was_cut_is_damaged(tmp_path):
    path = tmp_path / "images.npz"
    np.savez(path, COLOUR)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"images.npz is damaged or not an .npz file: "):
        NpzImages(path)


def test_nothing_is_lost_between_processes(folder):
    sizes = [sum(len(batch.images) for batch in stored_images(str(folder)).batches(2, rank, 3)) for rank in range(3)]
    assert sizes == [3, 2, 2]
    assert torch.tensor(sizes).sum() == 7


def test_what_follows_the_images_does_not_move_them(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, COLOUR)
    with zipfile.ZipFile(tmp_path / "images.npz", "w") as archive:
        archive.writestr("arr_0.npy", buffer.getvalue() + b"more")
    for world_size in (1, 2):
        np.testing.assert_array_equal(everything(stored_images(str(tmp_path / "images.npz")), 3, world_size), COLOUR)


def test_labels_that_are_no_classes(folder, tmp_path):
    (folder / "0.png").rename(folder / "z" / "0.png")
    (folder / ".hidden").mkdir()
    for index in range(1, 6):
        (folder / f"{index}.png").rename(folder / ".hidden" / f"{index}.png")
    with pytest.raises(UserError, match=r"images does not tell the classes of its images: a folder has a folder for "):
        _ = stored_images(str(folder)).labels
    png = (folder / "z" / "0.png").read_bytes()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("0.png", png), ("0.cls", b"9" * 5000)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(UserError) as error:
        _ = stored_images(str(tmp_path / "a.tar")).labels
    assert str(error.value) == (
        f"the label of image 0.png of {tmp_path / 'a.tar'} is b'{'9' * 20}', expected a number of at most 7 digits"
    )
