import numpy as np
import pytest
import torch

from smalti.core.errors import UserError
from smalti.eval.frechet import GaussianStatistics, frechet_distance
from smalti.eval.reference_statistics import is_statistics, read_statistics, write_statistics

RANDOM = np.random.default_rng(0)
ROWS = torch.from_numpy(RANDOM.normal(size=(20, 3)))


@pytest.fixture
def statistics():
    found = GaussianStatistics()
    found.update(ROWS)
    return found


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
            ": mu (3,) and sigma (2, 2) are no mean (D,) and covariance (D, D)",
        ),
        (
            {"mu": np.full(3, np.nan), "sigma": np.eye(3)},
            ": mu and sigma hold values that are not finite",
        ),
    ],
)
def test_other_arrays_are_refused(tmp_path, arrays, problem):
    path = tmp_path / "x.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserError) as error:
        read_statistics(path)
    assert str(error.value) == f"{path}{problem}"


def test_a_file_that_holds_objects_is_not_run(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, mu=np.array([{}], dtype=object), sigma=np.eye(1))
    with pytest.raises(UserError, match=r"x.npz is damaged or not a file of statistics: Object arrays cannot"):
        read_statistics(path)
