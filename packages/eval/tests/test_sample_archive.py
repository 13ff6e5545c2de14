import io
import zipfile

import numpy as np
import pytest

from smalti.core.errors import UserError
from smalti.eval.sample_archive import SampleArchive

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3)).astype(np.uint8)
LABELS = np.array([0, 1, 2, 0, 1])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("labels", [LABELS, LABELS.astype(np.uint8)])
@pytest.mark.parametrize("size", [1, 3, 5, 8])
def test_batches_are_the_images_in_order(tmp_path, save, labels, size):
    save(tmp_path / "samples.npz", IMAGES, labels)
    archive = SampleArchive(tmp_path / "samples.npz", 3)
    assert len(archive) == 5
    assert archive.shape == (5, 4, 6, 3)
    images, found = zip(*archive.batches(size), strict=True)
    assert all(len(batch) <= size for batch in images)
    np.testing.assert_array_equal(np.concatenate(images), IMAGES)
    np.testing.assert_array_equal(np.concatenate(found), LABELS)


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        (
            {"arr_0": IMAGES / 255, "arr_1": LABELS},
            ": images are arr_0 uint8 (N, H, W, 3), but it is float64 (5, 4, 6, 3)",
        ),
        (
            {"arr_0": IMAGES.transpose(0, 3, 1, 2), "arr_1": LABELS},
            ": images are arr_0 uint8 (N, H, W, 3), but it is uint8 (5, 3, 4, 6)",
        ),
        (
            {"arr_0": IMAGES[:, :0], "arr_1": LABELS},
            ": images are arr_0 uint8 (N, H, W, 3), but it is uint8 (5, 0, 6, 3)",
        ),
        ({"arr_0": IMAGES, "arr_1": LABELS[:, None]}, ": labels are arr_1 integer (5,), but it is int64 (5, 1)"),
        ({"arr_0": IMAGES, "arr_1": LABELS.astype(float)}, ": labels are arr_1 integer (5,), but it is float64 (5,)"),
        ({"arr_0": IMAGES, "arr_1": LABELS[:4]}, ": labels are arr_1 integer (5,), but it is int64 (4,)"),
        ({"arr_0": IMAGES[:0], "arr_1": LABELS[:0]}, " holds no samples: run `smalti sample` again"),
        ({"arr_0": IMAGES}, " has no array arr_1"),
        ({"images": IMAGES, "arr_1": LABELS}, " has no array arr_0"),
        (
            {"arr_0": np.asfortranarray(IMAGES), "arr_1": LABELS},
            ": arr_0 is in column order, expected rows first as numpy saves by default",
        ),
    ],
)
def test_another_layout_is_refused(tmp_path, arrays, problem):
    path = tmp_path / "samples.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserError) as error:
        SampleArchive(path, 3)
    assert str(error.value) == f"{path}{problem}"


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_out_of_range_is_refused(tmp_path, label):
    path = tmp_path / "samples.npz"
    np.savez(path, IMAGES, np.array([0, 1, label, 0, 9]))
    with pytest.raises(UserError) as error:
        SampleArchive(path, 3)
    assert str(error.value) == f"{path}: image 2 has the label {label}: with 3 classes, labels are 0 to 2"


def test_a_missing_file_says_what_makes_it(tmp_path):
    with pytest.raises(UserError) as error:
        SampleArchive(tmp_path / "samples.npz", 3)
    assert str(error.value) == f"{tmp_path / 'samples.npz'} does not exist: run `smalti sample` first"


@pytest.mark.parametrize("content", [b"", b"not a zip", None])
def test_a_damaged_file_is_refused(tmp_path, content):
    path = tmp_path / "samples.npz"
    buffer = io.BytesIO()
    np.savez(buffer, IMAGES, LABELS)
    path.write_bytes(buffer.getvalue()[:200] if content is None else content)
    with pytest.raises(UserError, match=r"samples.npz is damaged or not an .npz file: "):
        SampleArchive(path, 3)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_changed_byte_is_noticed(tmp_path, save):
    path = tmp_path / "samples.npz"
    save(path, IMAGES, LABELS)
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"samples.npz is damaged or not an .npz file: "):
        list(SampleArchive(path, 3).batches(2))


def test_an_array_that_ends_early_is_refused(tmp_path):
    path = tmp_path / "samples.npz"
    arrays = {}
    for name, array in (("arr_0.npy", IMAGES), ("arr_1.npy", LABELS)):
        buffer = io.BytesIO()
        np.save(buffer, array)
        arrays[name] = buffer.getvalue()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", arrays["arr_0.npy"][:-7])
        archive.writestr("arr_1.npy", arrays["arr_1.npy"])
    with pytest.raises(UserError, match=r"samples.npz is damaged: it ends after 353 of 360 bytes$"):
        list(SampleArchive(path, 3).batches(8))
