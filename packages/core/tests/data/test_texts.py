"""Texts of images: in shards, in lists, in batches."""

import io
import json

import numpy as np
import pytest

from smalti.core.data.listings import ListOptions
from smalti.core.data.loader import TrainBatches
from smalti.core.data.make_shards import ShardSettings, make_shards
from smalti.core.data.texts import text_of
from smalti.core.data.webdataset import WebDatasetOptions
from smalti.core.errors import UserError
from smalti.core.options import Preprocessing


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.fixture
def shard(tmp_path, make_png, make_tar):
    """The path of a shard of two samples without labels."""
    image = make_png(np.zeros((4, 4), np.uint8))
    features = np.arange(6, dtype=np.float16).reshape(2, 3)
    files = {}
    for key, caption in (("a", "ein Bär\n"), ("b", "two")):
        files |= {f"{key}.png": image, f"{key}.txt": caption.encode(), f"{key}.clip.npy": npy(features)}
    (tmp_path / "shard.tar").write_bytes(make_tar(files))
    return tmp_path / "shard.tar"


def test_captions_and_features_of_shards(shard):
    dataset = WebDatasetOptions(shards=str(shard), text="txt").build()
    assert dataset.classes == ("all",)
    assert [text_of(record) for record in dataset.records()] == ["ein Bär", "two"]
    assert [record.label for record in dataset.records()] == [0, 0]
    found = text_of(next(WebDatasetOptions(shards=str(shard), text="clip.npy").build().records()))
    assert found.dtype == np.float32
    assert found.tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(UserError, match=r"^sample 'a' of shard .* has no text: expected .caption, found .png, .txt, "):
        list(WebDatasetOptions(shards=str(shard), text="caption").build().records())


def test_captions_of_lists_and_of_the_shards_made_of_them(tmp_path, make_png):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(make_png(np.zeros((4, 4), np.uint8)))
    lines = [json.dumps({"image": f"{name}.png", "caption": f"this is {name}"}) for name in "ab"]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    dataset = ListOptions(path=str(tmp_path / "list.jsonl"), text="caption").build()
    assert [text_of(record) for record in dataset.records()] == ["this is a", "this is b"]
    settings = ShardSettings()
    out = tmp_path / "shards"
    out.mkdir()
    nothing = {"source": {}, "workers": 0, "max_undecodable": 0, "warn": print, "advance": lambda count: None}
    make_shards(dataset, out, settings, **nothing)
    again = WebDatasetOptions(shards=f"{out}/*.tar", text="txt").build()
    assert sorted(text_of(record) for record in again.records()) == ["this is a", "this is b"]
    batches = TrainBatches(again, Preprocessing(image_size=4, channels=1), 2, 0, 0, 1, 0, print)
    assert sorted(next(batches).texts) == ["this is a", "this is b"]
    with pytest.raises(UserError, match=r"has no column text: there are image, caption$"):
        ListOptions(path=str(tmp_path / "list.jsonl"), text="text").build()
    (tmp_path / "list.txt").write_text("a.png\n")
    with pytest.raises(UserError, match=r"list.txt cannot hold texts beside its images: take .csv, .json or .jsonl$"):
        ListOptions(path=str(tmp_path / "list.txt"), text="caption").build()


def test_damaged_texts_name_their_image(memory_dataset):
    record = memory_dataset(1).items[0]
    vast = io.BytesIO()
    np.save(vast, np.array([[1e300]]))
    for damaged in (b"\xff\xfe", b"\x93NUMPY", vast.getvalue()):
        with pytest.raises(UserError, match=r"^the text of image 'k0' is damaged: "):
            text_of(record._replace(text=damaged))
    assert text_of(record) is None


def test_halves_of_characters_in_a_list(tmp_path):
    path = tmp_path / "list.json"
    path.write_text('[{"image": "a.png", "caption": "half \\ud83d"}]')
    (record,) = ListOptions(path=str(path), text="caption").build().records()
    with pytest.raises(UserError, match=r"^the text of image 'a' is damaged: 'utf-8' codec can't decode"):
        text_of(record)
