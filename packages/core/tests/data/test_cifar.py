import os
import pickle
import re

import numpy as np
import pytest

from smalti.core.data.cifar import CIFAR10Options, CIFAR100Options
from smalti.core.data.decode import decode
from smalti.core.errors import UserError
from smalti.core.options import Preprocessing


def refused(sentence):
    return pytest.raises(UserError, match=re.escape(sentence))


def pixels(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), np.uint8)


@pytest.fixture
def cifar10(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for number, name in enumerate([*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]):
        batch = {b"data": pixels(4, number), b"labels": [3, 1, 0, number % 4], b"filenames": [b"x.png"] * 4}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"a", b"b", b"c", b"d"]}, protocol=2))
    return tmp_path


def test_images_and_labels_of_the_batches(cifar10):
    train, test = (CIFAR10Options(path=str(cifar10), split=split).build() for split in ("train", "test"))
    assert (len(train), len(test), train.classes) == (20, 4, ("a", "b", "c", "d"))
    records = list(train.records())
    assert [record.label for record in records[:8]] == [3, 1, 0, 0, 3, 1, 0, 1]
    how = Preprocessing(image_size=32, fit="pad")
    for batch in range(5):
        for row in range(4):
            expected = pixels(4, batch)[row].reshape(3, 32, 32)
            assert np.array_equal(decode(records[4 * batch + row].image, how), expected)
    order = [record.key for record in train.records(3)]
    assert sorted(order) == [record.key for record in records] != order
    assert [record.key for record in train.records_from(2, 3, 5)] == order[2::5]


def test_either_folder_will_do_and_the_environment(cifar10, monkeypatch):
    inner = CIFAR10Options(path=str(cifar10 / "cifar-10-batches-py")).build()
    monkeypatch.setenv("CIFAR10_ROOT", str(cifar10))
    monkeypatch.chdir(cifar10 / "cifar-10-batches-py")
    assert len(inner) == len(CIFAR10Options().build()) == len(CIFAR10Options(path=".").build()) == 20


def test_cifar100_has_fine_and_coarse_labels(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    batch = {"data": pixels(2), "fine_labels": [2, 0], "coarse_labels": [1, 1]}
    encoded = {key.encode(): value for key, value in batch.items()}
    (folder / "train").write_bytes(pickle.dumps(encoded, protocol=4))
    names = {b"fine_label_names": [b"x", b"y", b"z"], b"coarse_label_names": [b"u", b"v"]}
    (folder / "meta").write_bytes(pickle.dumps(names))
    monkeypatch.setenv("CIFAR100_ROOT", str(tmp_path))
    fine, coarse = CIFAR100Options().build(), CIFAR100Options(labels="coarse").build()
    assert [record.label for record in fine.records()] == [2, 0]
    assert [record.label for record in coarse.records()] == [1, 1]
    assert (fine.classes, coarse.classes) == (("x", "y", "z"), ("u", "v"))
    with refused(f"{folder}/test does not exist, expected a batch of CIFAR: the folder {folder} holds meta, train"):
        CIFAR100Options(split="test").build()


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_a_pickle_that_asks_for_more_is_refused(cifar10, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = cifar10 / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(pickle.dumps({b"data": Harmful()}))
    with refused(f"{path} is damaged or no batch of CIFAR: it asks for posix.system"):
        CIFAR10Options(path=str(cifar10), split="test").build()
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is damaged or no batch of CIFAR"),
        (b"text", "is damaged or no batch of CIFAR"),
        (pickle.dumps([1]), "is no batch of CIFAR: it has no data"),
        (pickle.dumps({b"data": pixels(2)}), "is no batch of CIFAR: it has no labels"),
        (pickle.dumps({b"data": pixels(2), b"labels": [0]}), "holds uint8 (2, 3072) for 1 labels"),
        (pickle.dumps({b"data": pixels(1), b"labels": [9]}), "holds a label that is none of the 4 classes"),
        (pickle.dumps({b"data": pixels(1), b"labels": ["a"]}), "holds a label that is none of the 4 classes"),
    ],
)
def test_damaged_batches(cifar10, content, sentence):
    (cifar10 / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    with refused(sentence):
        CIFAR10Options(path=str(cifar10), split="test").build()


def test_any_cut_of_a_batch_is_noticed(cifar10):
    path = cifar10 / "cifar-10-batches-py" / "test_batch"
    content = path.read_bytes()
    for end in range(0, len(content), 997):
        path.write_bytes(content[:end])
        with refused("is damaged or no batch of CIFAR"):
            CIFAR10Options(path=str(cifar10), split="test").build()


def test_a_wrong_folder(tmp_path):
    with refused(
        f"{tmp_path} is not the folder cifar-10-batches-py, or the one that holds it: the folder {tmp_path} is"
    ):
        CIFAR10Options(path=str(tmp_path)).build()


@pytest.mark.parametrize("names", [[b"a", 3], [b"\xff"], [None]])
def test_names_that_are_none(cifar10, names):
    path = cifar10 / "cifar-10-batches-py" / "batches.meta"
    path.write_bytes(pickle.dumps({b"label_names": names}, protocol=2))
    with refused(f"{path} is damaged: its label_names are no names"):
        CIFAR10Options(path=str(cifar10)).build()
