import json
import re

import numpy as np
import pytest

from smalti.core.data.folders import FolderOptions, ImageNetOptions
from smalti.core.errors import UserError


def refused(sentence):
    return pytest.raises(UserError, match=re.escape(sentence))


@pytest.fixture
def write(tmp_path, make_png):
    """Write images of one pixel's size at paths below `tmp_path`, each another grey."""

    def files(*paths):
        for number, path in enumerate(paths):
            place = tmp_path / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(make_png(np.full((1, 1), number, np.uint8)))
        return tmp_path

    return files


def labelled(dataset, order=None):
    return [(record.key, record.label) for record in dataset.records(order)]


@pytest.fixture(autouse=True)
def no_roots(monkeypatch):
    for name in ("DATASET_ROOT", "IMAGENET_ROOT"):
        monkeypatch.delenv(name, raising=False)


def test_a_folder_per_class_in_the_order_of_torchvision(write, monkeypatch):
    root = write("dog/b.png", "dog/a.jpg", "cat/deep/er/z.PNG", "cat/y.webp", "cat/deep/x.png", "cat/.hidden.png")
    (root / "dog" / "notes.txt").touch()
    dataset = FolderOptions(path=str(root)).build()
    assert dataset.classes == ("cat", "dog")
    assert labelled(dataset) == [("cat/y", 0), ("cat/deep/x", 0), ("cat/deep/er/z", 0), ("dog/a", 1), ("dog/b", 1)]
    assert [record.image for record in dataset.records()] == [
        (root / name).read_bytes()
        for name in ("cat/y.webp", "cat/deep/x.png", "cat/deep/er/z.PNG", "dog/a.jpg", "dog/b.png")
    ]
    assert (dataset.name, len(dataset)) == (root.name, 5)
    monkeypatch.chdir(root)
    assert FolderOptions(path=".").build().name == root.name


def test_orders_are_permutations_and_parts_of_them_are_had_at_once(write):
    dataset = FolderOptions(path=str(write(*(f"c/{number:02d}.png" for number in range(30))))).build()
    stored = labelled(dataset)
    assert labelled(dataset, 1) == labelled(dataset, 1) != labelled(dataset, 2)
    assert sorted(labelled(dataset, 1)) == stored
    part = [record.key for record in dataset.records_from(4, 1, 3)]
    assert part == [key for key, _ in labelled(dataset, 1)][4::3]


def test_images_without_classes(write):
    root = write("b/1.png", "a.png", "1.png")
    dataset = FolderOptions(path=str(root), labels="none").build()
    assert dataset.classes == ("all",)
    assert labelled(dataset) == [("1", 0), ("a", 0), ("b/1", 0)]


def test_keys_keep_their_endings_where_two_would_be_one(write):
    assert labelled(FolderOptions(path=str(write("c/1.png", "c/1.jpg", "c/2.png"))).build()) == [
        ("c/1.jpg", 0),
        ("c/1.png", 0),
        ("c/2.png", 0),
    ]


def test_a_file_that_is_gone(write):
    root = write("c/1.png")
    (record,) = FolderOptions(path=str(root)).build().records()
    (root / "c" / "1.png").unlink()
    with refused(f"{root}/c/1.png does not exist"):
        _ = record.image


def test_the_environment_gives_the_path_that_is_left_out(write, monkeypatch):
    root = write("c/1.png")
    with refused("data.path is missing and DATASET_ROOT is not set: give a folder with one folder of images per class"):
        FolderOptions().build()
    monkeypatch.setenv("DATASET_ROOT", str(root))
    assert len(FolderOptions().build()) == 1
    with refused("/elsewhere does not exist"):
        FolderOptions(path="/elsewhere").build()


def test_wrong_folders_show_what_is_there(write, tmp_path):
    expected = "a folder with one folder of images per class"
    with refused(f"{tmp_path}/x does not exist, expected {expected}: the folder {tmp_path} is empty"):
        FolderOptions(path=f"{tmp_path}/x").build()
    root = write("1.png", "2.png")
    with refused(f"{root} is not {expected}: the folder {root} holds 1.png, 2.png"):
        FolderOptions(path=str(root)).build()
    with refused(f"{root}/1.png is a file, expected {expected}"):
        FolderOptions(path=f"{root}/1.png").build()
    (root / "empty").mkdir()
    with refused(f"{root}/empty is not a folder with images: the folder {root}/empty is empty"):
        FolderOptions(path=f"{root}/empty", labels="none").build()


@pytest.fixture
def imagenet(write):
    return write("train/n02/1.JPEG", "train/n01/2.JPEG", "train/n03/3.JPEG", "val/n03/5.JPEG", "val/n01/4.JPEG")


def test_imagenet_by_folders(imagenet, monkeypatch):
    assert labelled(ImageNetOptions(path=str(imagenet)).build()) == [("n01/2", 0), ("n02/1", 1), ("n03/3", 2)]
    monkeypatch.setenv("IMAGENET_ROOT", str(imagenet))
    validation = ImageNetOptions(split="val").build()
    assert validation.classes == ("n01", "n03")  # without a class index, only what is there is known
    content = {"0": ["n03", "crab"], "1": ["n01", "cock"], "2": ["n02", "ostrich"]}
    (imagenet / "ImageNet_class_index.json").write_text(json.dumps(content))
    validation = ImageNetOptions(split="val").build()
    assert validation.classes == ("n03 crab", "n01 cock", "n02 ostrich")
    assert labelled(validation) == [("n01/4", 1), ("n03/5", 0)]
    assert labelled(ImageNetOptions().build()) == [("n01/2", 1), ("n02/1", 2), ("n03/3", 0)]


def test_imagenet_with_a_wrong_class_index(imagenet):
    index = imagenet / "ImageNet_class_index.json"
    index.write_text('{"0": ["n01", "cock"], "1": ["n02", "ostrich"]}')
    with refused(f"{imagenet}/train/n03 is no class of ImageNet_class_index.json, which tells of 2"):
        ImageNetOptions(path=str(imagenet)).build()
    index.write_text('{"n01": "cock"}')
    with refused(f'{index} is damaged, expected {{"0": ["n01440764", "tench"], ...}}'):
        ImageNetOptions(path=str(imagenet)).build()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("val_label.txt", "v_1.JPEG 2\nv_2.JPEG 0\n"),
        ("val_labels.txt", "v_2 n01\nv_1 n03\n"),
        ("val_label.txt", "2\n0\n"),
        ("val_label.json", '{"v_1.JPEG": 2, "v_2.JPEG": "n01"}'),
        ("LOC_val_solution.csv", "ImageId,PredictionString\nv_2,n01 1 2 3 4\nv_1,n03 1 2 3 4 n03 5 6 7 8\n"),
    ],
)
def test_imagenets_flat_validation(write, name, content):
    root = write("train/n01/1.JPEG", "train/n02/1.JPEG", "train/n03/1.JPEG", "val/v_1.JPEG", "val/v_2.JPEG")
    (root / name).write_text(content)
    dataset = ImageNetOptions(path=str(root), split="val").build()
    assert labelled(dataset) == [("v_1", 2), ("v_2", 0)]
    assert dataset.classes == ("n01", "n02", "n03")


def test_imagenets_flat_validation_alone(write):
    root = write("val/v_1.JPEG")
    with refused(f"{root} is not a folder with ImageNet_class_index.json or train/, which tell the classes of val/"):
        ImageNetOptions(path=str(root), split="val").build()


def test_imagenets_flat_validation_with_wrong_labels(write):
    root = write("train/n01/1.JPEG", "val/v_1.JPEG", "val/v_2.JPEG")
    options = ImageNetOptions(path=str(root), split="val")
    with refused(f"{root} is not the labels of {root}/val, in val_label.txt or folders by class: the folder"):
        options.build()
    labels = root / "val_label.txt"
    labels.write_text("v_1 0\n")
    with refused(f"{labels} has no label for v_2 of {root}/val"):
        options.build()
    labels.write_text("v_1 0\nv_2 n07\n")
    with refused(f"{labels}: a label is neither a number nor a class of {root}"):
        options.build()
    labels.write_text("v_1 0\nv_2 5\n")
    with refused("image v_2.JPEG of imagenet has the label 5: with 1 classes, labels are 0 to 0"):
        options.build()
    labels.write_text("v_1 0\n,,\nv_2 0\n")  # a line without a word is passed over
    assert labelled(options.build()) == [("v_1", 0), ("v_2", 0)]
    labels.unlink()
    (root / "val_label.json").write_text("[0, 0]")
    with refused(f"{root}/val_label.json is damaged, expected a label for each image of {root}/val"):
        options.build()
    with refused(f"{root}/nothing does not exist, expected the folder of ImageNet, with train/ and val/"):
        ImageNetOptions(path=f"{root}/nothing").build()
    with refused(
        f"{root}/train is not the folder of ImageNet, with train/ and val/: the folder {root}/train holds n01"
    ):
        ImageNetOptions(path=f"{root}/train").build()
