import re
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from smalti.core.errors import UserError
from smalti.eval.evaluation_sides import opened_statistics
from smalti.eval.frechet import frechet_distance, statistics_of
from smalti.eval.npz_images import NpzImages
from smalti.eval.reference_statistics import is_statistics, read_statistics, write_statistics

RANDOM = np.random.default_rng(0)
ROWS = torch.from_numpy(RANDOM.normal(size=(20, 3)))


@pytest.fixture
def statistics():
    return statistics_of(ROWS)


def test_ours_come_back_with_their_protocol_and_are_read_as_others_are(tmp_path, statistics):
    path = tmp_path / "ours.npz"
    protocol = {"extractor": {"fingerprint": "f"}}
    write_statistics(path, {"pool": statistics, "spatial": statistics}, 20, protocol)
    first = path.read_bytes()
    found = read_statistics(path)
    assert (found.count, found.protocol, found.images, sorted(found.statistics)) == (
        20,
        protocol,
        0,
        ["pool", "spatial"],
    )
    assert frechet_distance(found.statistics["pool"], statistics) == pytest.approx(0, abs=1e-12)
    with np.load(path) as file:  # the names of pytorch-fid
        np.testing.assert_array_equal(file["mu"], statistics.mean.numpy())
        np.testing.assert_array_equal(file["sigma"], statistics.covariance.numpy())
    write_statistics(path, {"pool": statistics, "spatial": statistics}, 20, protocol)
    assert path.read_bytes() == first


def test_files_of_others(tmp_path):
    path = tmp_path / "adm.npz"
    mean, covariance = ROWS.mean(0).numpy(), np.cov(ROWS.numpy(), rowvar=False)
    np.savez(path, mu=mean.astype(np.float32), sigma=covariance)
    found = read_statistics(path)
    assert (found.count, found.protocol, found.images, list(found.statistics)) == (None, None, 0, ["pool"])
    images = np.zeros((5, 4, 4, 3), np.uint8)
    np.savez(path, images, mu=mean, sigma=covariance, mu_s=mean, sigma_s=covariance)
    found = read_statistics(path)
    assert (found.images, list(found.statistics)) == (5, ["pool", "spatial"])
    assert is_statistics(path)
    np.savez(path, images)
    assert not is_statistics(path)


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"mu": np.zeros(3)}, " has no statistics, expected arrays mu (D,) and sigma (D, D)"),
        (
            {"mu": np.zeros(3), "sigma": np.zeros((2, 2))},
            ": mu float64 (3,) and sigma float64 (2, 2) are no mean (D,) and covariance (D, D)",
        ),
        (
            {"mu": np.full(3, np.nan), "sigma": np.eye(3)},
            ": mu and sigma hold values that are not finite",
        ),
        (
            {"mu": np.array([{}], dtype=object), "sigma": np.eye(1)},
            ": mu object (1,) and sigma float64 (1, 1) are no mean (D,) and covariance (D, D)",
        ),
        (
            {"mu": np.zeros(2), "sigma": np.array([["1", "0"], ["0", "1"]])},
            ": mu float64 (2,) and sigma <U1 (2, 2) are no mean (D,) and covariance (D, D)",
        ),
        (
            {"mu": np.zeros(1), "sigma": np.eye(1), "count": np.array([5])},
            " is damaged: count is int64 (1,), expected a single value",
        ),
        (
            {"mu": np.zeros(1), "sigma": np.eye(1), "protocol": np.array("{")},
            " is damaged: its protocol is no JSON: Expecting property name enclosed in double quotes: line 1 column 2 "
            "(char 1)",
        ),
    ],
)
def test_other_arrays_are_refused(tmp_path, arrays, problem):
    path = tmp_path / "x.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserError) as error:
        read_statistics(path)
    assert str(error.value) == f"{path}{problem}"


def test_vast_arrays_are_not_unpacked(tmp_path, monkeypatch):
    """A megabyte of zeros packed together unfolds to a thousand."""
    monkeypatch.setattr("smalti.eval.reference_statistics.WIDEST", 100)
    monkeypatch.setattr("smalti.eval.reference_statistics.values_of", pytest.fail)
    path = tmp_path / "x.npz"
    np.savez_compressed(path, mu=np.zeros(101), sigma=np.zeros((101, 101)))
    with pytest.raises(UserError) as error:
        read_statistics(path)
    assert str(error.value) == f"{path}: mu is of 101 values, statistics are read of up to 100"


def test_a_covariance_may_lie_in_the_order_of_columns(tmp_path, statistics):
    path = tmp_path / "x.npz"
    np.savez(path, mu=statistics.mean.numpy(), sigma=np.asfortranarray(statistics.covariance.numpy()))
    torch.testing.assert_close(read_statistics(path).statistics["pool"].covariance, statistics.covariance)


def _zip(path, member, compress=False):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        archive.writestr("arr_0.npy", member)
    return path


def _header(shape, more=""):
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}{more}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    "member", [_header((2, 2, 2, 3), "("), _header((-1, 2, 2, 3)), _header((10**9, 10**9, 10**9, 3)), b"", b"x" * 200]
)
@pytest.mark.parametrize("compress", [False, True])
def test_images_that_are_none(tmp_path, member, compress):
    path = _zip(tmp_path / "images.npz", member, compress)
    with pytest.raises(UserError) as caught:
        NpzImages(path)
    assert str(caught.value).startswith(f"{path} is damaged")


def test_an_archive_whose_compression_breaks_or_is_of_the_future(tmp_path):
    path = _zip(tmp_path / "images.npz", _header((64, 8, 8, 3)) + RANDOM.bytes(64 * 8 * 8 * 3), compress=True)
    whole = path.read_bytes()
    start = len(whole) // 2
    path.write_bytes(whole[:start] + bytes(200) + whole[start + 200 :])
    with pytest.raises(UserError, match=re.escape(f"{path} is damaged")):
        list(NpzImages(path).batches(8))
    entry = bytearray(whole)
    entry[whole.rindex(b"PK\x01\x02") + 6] = 255  # the version that is needed to unpack it
    path.write_bytes(entry)
    with pytest.raises(UserError, match=re.escape(f"{path} is damaged or not an .npz file: zip file version 25.5")):
        is_statistics(path)


@pytest.mark.parametrize("protocol", [[], 3, {}, {"extractor": None}, {"extractor": {"fingerprint": "f"}}])
def test_a_protocol_that_tells_nothing(tmp_path, statistics, protocol):
    path = tmp_path / "ours.npz"
    write_statistics(path, {"pool": statistics}, 20, protocol)
    with pytest.raises(UserError) as caught:
        opened_statistics(str(path), SimpleNamespace(fingerprint="f"), SimpleNamespace(name="p", preprocessing=None))
    assert str(caught.value) == (f"{path} is damaged: what it says of its making lacks extractor or preprocessing")
