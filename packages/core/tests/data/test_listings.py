import json
import re

import pytest

from smalti.core.data.celeba import FACE, CelebAOptions
from smalti.core.data.listings import ListOptions, MiniImageNetOptions
from smalti.core.errors import UserError


def refused(sentence):
    return pytest.raises(UserError, match=re.escape(sentence))


def listed(path, content, **options):
    path.write_text(content)
    return ListOptions(path=str(path), **options).build()


def labelled(dataset):
    return [(record.key, record.label) for record in dataset.records()]


@pytest.mark.parametrize(
    ("name", "content", "label"),
    [
        ("l.txt", "b c/1.jpg 2\n\na.jpg\t0\n", "label"),
        ("l.csv", "filename,class\nb c/1.jpg,2\na.jpg,0\n", "class"),
        ("l.csv", "\ufefffile,class\nb c/1.jpg,2\na.jpg,0\n", "class"),
        ("l.json", '[{"image_path": "b c/1.jpg", "kind": 2}, {"image_path": "a.jpg", "kind": 0}]', "kind"),
        ("l.json", '{"b c/1.jpg": 2, "a.jpg": 0}', "label"),
        ("l.jsonl", '{"image": "b c/1.jpg", "y": 2}\n{"image": "a.jpg", "y": 0}\n', "y"),
    ],
)
def test_lists_of_all_kinds(tmp_path, name, content, label):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    dataset = ListOptions(path=str(path), label=label).build()
    assert labelled(dataset) == [("b c/1", 2), ("a", 0)]
    assert (dataset.name, dataset.classes) == ("l", ("0", "1", "2"))


@pytest.mark.parametrize(
    ("name", "content"),
    [("l.txt", "b c/1.jpg\na.jpg\n"), ("l.json", '["b c/1.jpg", "a.jpg"]'), ("l.jsonl", '"b c/1.jpg"\n"a.jpg"')],
)
def test_lists_without_labels(tmp_path, name, content):
    dataset = listed(tmp_path / name, content)
    assert labelled(dataset) == [("b c/1", 0), ("a", 0)]
    assert dataset.classes == ("all",)


def test_files_lie_below_the_root_or_where_the_list_lies(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"inner")
    (tmp_path / "a.png").write_bytes(b"outer")
    path = tmp_path / "l.txt"
    assert next(listed(path, "a.png").records()).image == b"outer"
    assert next(listed(path, "a.png", root=str(tmp_path / "images")).records()).image == b"inner"
    assert next(listed(path, f"{tmp_path}/images/a.png").records()).image == b"inner"
    with refused(f"{tmp_path}/none does not exist, expected the folder of the images that {path} lists"):
        listed(path, "a.png", root=str(tmp_path / "none"))


def test_names_of_classes(tmp_path):
    content = "image,label\n1.png,dog\n2.png,cat\n"
    path = tmp_path / "l.csv"
    assert listed(path, content, label="label").classes == ("cat", "dog")
    assert labelled(listed(path, content, label="label")) == [("1", 1), ("2", 0)]
    assert labelled(listed(path, content, label="label", classes=["dog", "emu", "cat"])) == [("1", 0), ("2", 2)]
    assert listed(path, "image,label\n1.png,1\n", label="label", classes=4).classes == ("0", "1", "2", "3")
    with refused(f"{path} has the label 'dog', which is none of the 1 classes"):
        listed(path, content, label="label", classes=["cat"])
    with refused(f"{path} has 2 classes, the option classes says 3"):
        listed(path, content, label="label", classes=3)
    with refused("image 1.png of l has the label 7: with 2 classes, labels are 0 to 1"):
        listed(path, "image,label\n1.png,7\n", label="label", classes=2)


@pytest.mark.parametrize(
    ("name", "content", "options", "sentence"),
    [
        ("l.csv", "a,b\n1,2\n", {}, "l.csv has no column image or filename or file_name or file or image_path or path"),
        ("l.csv", "image,b\n1,2\n", {"label": "y"}, "l.csv has no column y: there are image, b"),
        ("l.json", '[{"image": "a"}, {"file": "b"}]', {}, "l.json has no 'image' in entry 2"),
        ("l.csv", "image,y\na,0\nb\n", {"label": "y"}, "l.csv has no 'y' in entry 2"),
        ("l.csv", "image,y\na,0\nb,\n", {"label": "y"}, "l.csv has no label in entry 2"),
        ("l.json", '{"a": 0, "b": null}', {"label": "label"}, "l.json has no 'label' in entry 2"),
        ("l.csv", "image,y\na,1\nb,-1\n", {"label": "y"}, "l.csv has the label -1, expected numbers from 0 on of at"),
        ("l.json", "[1, 2]", {}, "l.json is no list of images: expected paths or objects"),
        ("l.json", "{", {}, "l.json is damaged, expected a list of images: Expecting property name"),
        ("l.jsonl", '{"image": "a"}\n{', {}, "l.jsonl is damaged, expected a list of images"),
        ("l.txt", "", {}, "l.txt lists no image"),
        ("l.txt", "alone\n", {"label": "y"}, "l.txt has the line 'alone': expected a path, white space and a label"),
        ("l.yaml", "a: b", {}, "l.yaml is no list of images: expected .txt, .csv, .json or .jsonl"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path, name, content, options, sentence):
    with refused(sentence):
        listed(tmp_path / name, content, **options)


def test_a_list_is_a_file(tmp_path):
    expected = "a list of images in .txt, .csv, .json or .jsonl"
    with refused(f"{tmp_path}/l.txt does not exist, expected {expected}: the folder {tmp_path} is empty"):
        ListOptions(path=f"{tmp_path}/l.txt").build()
    with refused(f"{tmp_path} is not {expected}"):
        ListOptions(path=str(tmp_path)).build()


def test_mini_imagenet(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "n02_1.jpg").write_bytes(b"2")
    (tmp_path / "train.csv").write_text("filename,label\nn02_1.jpg,n02\nn01_1.jpg,n01\nn02_2.jpg,n02\n")
    monkeypatch.setenv("MINI_IMAGENET_ROOT", str(tmp_path))
    dataset = MiniImageNetOptions().build()
    assert labelled(dataset) == [("n02_1", 1), ("n01_1", 0), ("n02_2", 1)]
    assert dataset.classes == ("n01", "n02")
    assert next(dataset.records()).image == b"2"
    with refused(
        f"{tmp_path} is not the folder of mini-ImageNet, with images/ and val.csv: the folder {tmp_path} holds"
    ):
        MiniImageNetOptions(split="val").build()


@pytest.fixture
def celeba(tmp_path):
    (tmp_path / "img_align_celeba").mkdir()
    for name in ("000001.jpg", "000002.jpg"):
        (tmp_path / "img_align_celeba" / name).write_bytes(name.encode())
    (tmp_path / "list_eval_partition.txt").write_text("000001.jpg 0\n000002.jpg 2\n000003.jpg 0\n")
    return tmp_path


def test_celeba(celeba, monkeypatch):
    monkeypatch.setenv("CELEBA_ROOT", str(celeba))
    assert labelled(CelebAOptions().build()) == [("000001", 0), ("000003", 0)]
    (test,) = CelebAOptions(split="test").build().records()
    assert (test.image, test.box) == (b"000002.jpg", FACE)
    assert next(CelebAOptions(crop="none").build().records()).box is None
    with refused(f"celeba in {celeba}/img_align_celeba holds no image"):
        CelebAOptions(split="val").build()


def test_celeba_as_kaggle_packs_it(celeba, tmp_path):
    outer = tmp_path / "archive"
    (outer / "img_align_celeba").mkdir(parents=True)
    (celeba / "img_align_celeba").rename(outer / "img_align_celeba" / "img_align_celeba")
    (outer / "list_eval_partition.csv").write_text("image_id,partition\n000001.jpg,1\n")
    (record,) = CelebAOptions(path=str(outer), split="val").build().records()
    assert record.image == b"000001.jpg"


def test_celeba_that_is_not_there(celeba):
    (celeba / "list_eval_partition.txt").write_text("000001.jpg 0 1\n")
    with refused("list_eval_partition.txt is damaged, expected lines with a file and the number of its split"):
        CelebAOptions(path=str(celeba)).build()
    (celeba / "list_eval_partition.txt").unlink()
    with refused(f"{celeba} is not the folder of CelebA, with img_align_celeba/ and list_eval_partition.txt"):
        CelebAOptions(path=str(celeba)).build()


def test_lists_of_numbers_as_json_writes_them(tmp_path):
    content = json.dumps([{"image": "a.png", "label": 1}, {"image": "b.png", "label": 0}])
    assert labelled(listed(tmp_path / "l.json", content, label="label")) == [("a", 1), ("b", 0)]


def test_labels_beyond_all_classes(tmp_path):
    path = tmp_path / "l.csv"
    for label in ("1000000000000", "1" * 5000):
        path.write_text(f"image,label\na.png,{label}\n")
        with refused(f"{path} has the label 1"):
            ListOptions(path=str(path), label="label").build()
        with refused(f"{path} has the label '1"):
            ListOptions(path=str(path), label="label", classes=("a",)).build()


def test_a_path_that_is_none(tmp_path):
    path = tmp_path / "l.jsonl"
    path.write_text('{"image": "a\\u0000.png"}\n')
    (record,) = ListOptions(path=str(path)).build().records()
    with refused(f"{tmp_path}/a\\x00.png cannot be read: embedded null byte"):
        _ = record.image


def test_nested_beyond_reading(tmp_path):
    path = tmp_path / "l.json"
    path.write_text("[" * 100_000)
    with refused(f"{path} is damaged, expected a list of images: it is nested too deeply"):
        ListOptions(path=str(path)).build()


def test_splits_of_celeba_that_are_no_text(tmp_path):
    (tmp_path / "img_align_celeba").mkdir()
    table = tmp_path / "list_eval_partition.txt"
    table.write_bytes(b"000001.jpg 0\n\xff")
    with refused(f"{table} cannot be read as text: "):
        CelebAOptions(path=str(tmp_path)).build()


def test_only_ends_of_lines_end_entries(tmp_path):
    path = tmp_path / "l.jsonl"
    caption = "one\u2028two\x85three"
    path.write_text(json.dumps({"image": "a.png", "text": caption}, ensure_ascii=False) + "\r\n", encoding="utf-8")
    (record,) = ListOptions(path=str(path), text="text").build().records()
    assert record.text_bytes.decode() == caption


@pytest.mark.parametrize("name", ["l.txt", "l.json", "l.jsonl", "l.csv"])
def test_a_mark_of_byte_order_is_no_part_of_a_list(tmp_path, name):
    content = {".txt": "a.png", ".json": '["a.png"]', ".jsonl": '"a.png"', ".csv": "image\na.png"}
    path = tmp_path / name
    path.write_text(content[path.suffix], encoding="utf-8-sig")
    assert labelled(ListOptions(path=str(path)).build()) == [("a", 0)]


def test_a_list_that_may_not_be_read(tmp_path, monkeypatch):
    path = tmp_path / "l.txt"
    path.touch()

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "read_text", refuse)
    with refused(f"{path} cannot be read: Permission denied"):
        ListOptions(path=str(path)).build()
