import json
import re

import numpy as np
import pyarrow as pa
import pytest

from smalti.core.data import arrow
from smalti.core.data.arrow import HuggingFaceOptions
from smalti.core.errors import UserError


def refused(sentence):
    return pytest.raises(UserError, match=re.escape(sentence))


def write(path, rows, names=None, image="image", label="label"):
    """An Arrow stream as `datasets` writes it."""
    table = pa.table(
        {
            image: pa.array(
                [{"bytes": content, "path": place} for content, place, _ in rows],
                pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            ),
            **({label: pa.array([number for *_, number in rows])} if label else {}),
        }
    )
    if names:
        features = {image: {"_type": "Image"}, label: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


@pytest.fixture
def folder(tmp_path):
    rows = [(f"image {number}".encode(), None, number % 3) for number in range(7)]
    for number, part in enumerate((rows[:4], rows[4:])):
        write(tmp_path / "set" / "train" / f"data-0000{number}-of-00002.arrow", part, ["ant", "bee", "cow"])
    return tmp_path / "set"


def test_rows_of_all_files(folder, monkeypatch):
    dataset = HuggingFaceOptions(path=str(folder)).build()
    assert (dataset.name, dataset.classes, len(dataset)) == ("set", ("ant", "bee", "cow"), 7)
    records = list(dataset.records())
    assert [record.image for record in records] == [f"image {number}".encode() for number in range(7)]
    assert [record.label for record in records] == [0, 1, 2, 0, 1, 2, 0]
    order = [record.image for record in dataset.records(1)]
    assert sorted(order) == [record.image for record in records] != order
    monkeypatch.setenv("DATASET_ROOT", str(folder / "train"))
    assert len(HuggingFaceOptions().build()) == 7


def test_images_that_lie_in_files_of_their_own(tmp_path):
    (tmp_path / "a.png").write_bytes(b"inside")
    write(tmp_path / "x.arrow", [(None, f"{tmp_path}/a.png", 0), (None, f"{tmp_path}/b.png", 1)])
    dataset = HuggingFaceOptions(path=str(tmp_path)).build()
    assert dataset.classes == ("0", "1")
    first, second = dataset.records()
    assert first.image == b"inside"
    with refused(f"{tmp_path}/b.png does not exist"):
        _ = second.image


def test_columns_by_other_names(tmp_path):
    write(tmp_path / "x.arrow", [(b"1", None, "dog"), (b"2", None, "cat")], image="photo", label="kind")
    with refused(f"{tmp_path} has no column image or img or jpg or png: there are photo, kind"):
        HuggingFaceOptions(path=str(tmp_path)).build()
    dataset = HuggingFaceOptions(path=str(tmp_path), image="photo", label="kind").build()
    assert dataset.classes == ("cat", "dog")
    assert [record.label for record in dataset.records()] == [1, 0]
    with refused(f"{tmp_path} has no column sort: there are photo, kind"):
        HuggingFaceOptions(path=str(tmp_path), image="photo", label="sort").build()
    assert HuggingFaceOptions(path=str(tmp_path), image="photo").build().classes == ("all",)


def test_a_column_without_images(tmp_path):
    write(tmp_path / "x.arrow", [(b"1", None, 0)])
    (record,) = HuggingFaceOptions(path=str(tmp_path), image="label").build().records()
    with refused("row 0 holds no image but int"):
        _ = record.image


def test_folders_and_files_that_cannot_be_used(folder, tmp_path):
    with refused(f"{tmp_path} is not a folder with .arrow files, or one with a folder of them per split (train)"):
        HuggingFaceOptions(path=str(tmp_path)).build()
    with refused(f"{folder} is not a folder with .arrow files, or one with a folder of them per split (test)"):
        HuggingFaceOptions(path=str(folder), split="test").build()
    write(folder / "train" / "odd.arrow", [(b"1", None, 0)], label="other")
    with refused(f"the .arrow files in {folder}/train have different columns, expected those of one split"):
        HuggingFaceOptions(path=str(folder)).build()
    (folder / "train" / "odd.arrow").write_bytes(b"nothing of the kind")
    with refused(f"{folder}/train/odd.arrow is damaged or no Arrow stream"):
        HuggingFaceOptions(path=str(folder)).build()
    write(folder / "train" / "odd.arrow", [(b"1", None, 5)], ["ant", "bee", "cow"])
    with refused(f"{folder}/train holds a label that is none of the 3 classes"):
        HuggingFaceOptions(path=str(folder)).build()


def test_without_the_extra_the_sentence_names_it(monkeypatch):
    monkeypatch.setattr(arrow, "find_spec", lambda name: None)
    with refused("reading Arrow files needs the extra smalti-core[arrow], which is not installed"):
        HuggingFaceOptions(path="x").build()


def test_offsets_that_point_out_of_the_file(tmp_path):
    """pyarrow follows them unless it is told to look."""
    path = tmp_path / "data.arrow"
    write(path, [(b"abc", None, 0), (b"def", None, 1)])
    offsets, beyond = (np.array([0, 3, last], np.int32).tobytes() for last in (6, 1 << 30))
    content = path.read_bytes()
    assert content.count(offsets) == 1
    path.write_bytes(content.replace(offsets, beyond))
    with refused(f"{path} is damaged or no Arrow stream: "):
        HuggingFaceOptions(path=str(tmp_path)).build()


def test_rows_without_a_label(tmp_path):
    write(tmp_path / "data.arrow", [(b"1", None, 0), (b"2", None, None)])
    with refused(f"{tmp_path} has no label in entry 2"):
        HuggingFaceOptions(path=str(tmp_path)).build()


def test_names_nested_beyond_reading(tmp_path):
    path = tmp_path / "data.arrow"
    table = pa.table({"image": [b"1"], "label": [2]}, metadata={"huggingface": "[" * 100_000})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    assert HuggingFaceOptions(path=str(tmp_path)).build().classes == ("0", "1", "2")
