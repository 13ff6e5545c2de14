import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from smalti.core.data import webdataset
from smalti.core.data.tar_shards import index_shard, read_shard
from smalti.core.data.webdataset import WebDatasetOptions
from smalti.core.errors import UserError


def keys(dataset, order=None):
    return [record.key for record in dataset.records(order)]


def build(shards, classes=3, **options):
    return WebDatasetOptions(shards=shards, classes=classes, **options).build()


def refused(sentence):
    return pytest.raises(UserError, match=re.escape(sentence))


@pytest.mark.parametrize(
    ("split", "per_class", "digest"),
    [  # of keys, pixels and labels as they are in the published files
        ("train", 750, "be3d90789c60adbf0ebf716edd1b34abda77fda4e834aaa5a841fce64828437a"),
        ("validation", 100, "4c6f53daf62b1b3496e0c2d9ce5745f89b0d696c972366497960b8076fdb80ca"),
    ],
)
def test_embedded_images_survive_and_are_balanced(split, per_class, digest):
    dataset = WebDatasetOptions(shards=f"embedded:fashion-mnist/{split}-*.tar.gz").build()
    assert (dataset.name, len(dataset), len(dataset.classes)) == ("fashion-mnist", 10 * per_class, 10)
    records = list(dataset.records())
    assert np.bincount([record.label for record in records]).tolist() == [per_class] * 10
    content = hashlib.sha256()
    for record in sorted(records):
        with Image.open(io.BytesIO(record.image)) as image:
            content.update(record.key.encode() + np.asarray(image).tobytes() + bytes([record.label]))
    assert content.hexdigest() == digest


def test_embedded_splits_share_no_image():
    train = WebDatasetOptions(shards="embedded:fashion-mnist/train-*.tar.gz").build()
    held_out = WebDatasetOptions(shards="embedded:fashion-mnist/validation-*.tar.gz").build()
    assert not set(keys(train)) & set(keys(held_out))


def test_embedded_assets_are_small_and_carry_their_licence():
    folder = webdataset.ASSETS / "fashion-mnist"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4_200_000
    assert "Copyright (c) 2017 Zalando SE" in (folder / "LICENSE").read_text()


@pytest.mark.parametrize("packed", [False, True])
def test_stored_order_is_the_order_of_files(shard_folder, packed):
    folder = shard_folder(3, 2, packed=packed)
    dataset = build(f"{folder}/train-*")
    assert keys(dataset) == ["s000", "s001", "s002", "s003", "s004"]
    assert [record.label for record in dataset.records()] == [0, 1, 2, 0, 1]
    assert len(dataset) == 5


@pytest.mark.parametrize("buffer", [1, 3, 1000])
def test_an_order_is_a_permutation_and_always_the_same(shard_folder, buffer):
    folder = shard_folder(5, 6, 7)
    fresh, used = (build(f"{folder}/*.tar", shuffle_buffer=buffer) for _ in range(2))
    stored = keys(used)
    orders = [keys(used, order) for order in range(5)]
    assert [keys(fresh, order) for order in range(5)] == orders
    assert all(sorted(order) == stored for order in orders)
    assert len({tuple(order) for order in orders}) > 1


def test_a_large_buffer_mixes_shards(shard_folder):
    dataset = build(f"{shard_folder(10, 10)}/*.tar")
    first = keys(dataset, 1)[:10]
    assert 0 < sum(key < "s010" for key in first) < 10


def test_shards_beyond_the_memory_kept_are_read_again(shard_folder, monkeypatch):
    folder = shard_folder(3, 3, packed=True)
    monkeypatch.setattr(webdataset, "KEPT_BYTES", 3 * 80)
    dataset = build(f"{folder}/*.tar.gz")
    everything = keys(dataset)
    (folder / "train-0000.tar.gz").unlink()
    assert len(everything) == 6
    records = dataset.records()
    assert [next(records).key for _ in range(3)] == ["s000", "s001", "s002"]
    (folder / "train-0001.tar.gz").unlink()
    with refused("train-0001.tar.gz does not exist"):
        next(records)


def test_of_plain_shards_an_image_is_read_when_it_is_asked_for(shard_folder):
    plain = build(f"{shard_folder(3, 2)}/*.tar")
    packed = build(f"{shard_folder(3, 2, packed=True)}/*.tar.gz")
    records = list(plain.records())
    assert [record.image for record in records] == [record.image for record in packed.records()]
    for path in shard_folder(3, 2).glob("train-0001.tar"):
        os.truncate(path, 1024)
    assert records[2].image == records[2].content.read()
    with refused("train-0001.tar is damaged: it ends before byte"):
        _ = records[3].image


@pytest.mark.parametrize("order", [None, 5])
def test_every_second_record(shard_folder, order):
    dataset = build(f"{shard_folder(5, 6)}/*.tar", shuffle_buffer=3)
    everything = keys(dataset, order)
    for start in range(12):
        assert [record.key for record in dataset.records_from(start, order, 2)] == everything[start::2]


def test_a_damaged_plain_shard_is_noticed_when_its_headers_are_read(shard_folder):
    folder = shard_folder(3, 2)
    content = bytearray((folder / "train-0000.tar").read_bytes())
    content[2 * 1024 + 20] ^= 1
    (folder / "train-0000.tar").write_bytes(content)
    with refused(f"shard {folder}/train-0000.tar is damaged or incomplete after 0 samples: bad checksum"):
        keys(build(f"{folder}/*.tar"))
    os.truncate(folder / "train-0001.tar", 3 * 1024)
    with refused(f"shard {folder}/train-0001.tar is damaged or incomplete after 1 samples: the end-of-archive"):
        keys(build(f"{folder}/train-0001.tar"))
    parts = build(f"{folder}/*.tar").parts()
    assert len(parts) == 2
    for part in parts:
        with refused("is damaged or incomplete"):
            list(part)


def test_records_from_somewhere_on(shard_folder):
    folder = shard_folder(3, 2, 4)
    everything = keys(build(f"{folder}/*.tar"))
    for start in range(11):
        counted = build(f"{folder}/*.tar")
        assert len(counted) == 9
        for dataset in (build(f"{folder}/*.tar"), counted):
            assert [record.key for record in dataset.records_from(start)] == everything[start:]


def test_shards_before_the_start_are_not_read(shard_folder):
    folder = shard_folder(3, 2, card=True)
    (folder / "train-0000.tar").write_bytes(b"damaged")
    dataset = build(f"{folder}/*.tar")
    assert [record.key for record in dataset.records_from(4)] == ["s004"]


def test_several_patterns_braces_and_pipes(shard_folder):
    folder = shard_folder(2, 2, 2)
    assert keys(build(f"{folder}/train-{{0000..0001}}.tar")) == ["s000", "s001", "s002", "s003"]
    assert keys(build([f"{folder}/train-0002.tar", f"{folder}/train-0000.tar"])) == ["s004", "s005", "s000", "s001"]
    assert keys(build(f"pipe:cat {folder}/train-0001.tar")) == ["s002", "s003"]
    packed = folder / "all.tgz"
    packed.write_bytes(gzip.compress((folder / "train-0001.tar").read_bytes()))
    assert keys(build(f"pipe:cat {packed}")) == ["s002", "s003"]


def test_a_card_gives_name_classes_and_length(shard_folder):
    folder = shard_folder(3, 2, card=True)
    dataset = build(f"{folder}/*.tar", classes=None)
    assert (dataset.name, dataset.classes) == ("threes", ("a", "b", "c"))
    (folder / "train-0001.tar").write_bytes(b"")
    assert len(dataset) == 5
    assert build(f"{folder}/*.tar", classes=4).classes == ("0", "1", "2", "3")
    assert build(f"{folder}/*.tar", classes=["x", "y", "z"]).classes == ("x", "y", "z")


def test_a_card_tells_nothing_of_other_folders(shard_folder, tmp_path):
    folder = shard_folder(3, card=True)
    (tmp_path / "other").mkdir()
    (folder / "train-0000.tar").rename(tmp_path / "other" / "train-0000.tar")
    shard_folder(2, card=True)
    assert len(build([f"{folder}/*.tar", f"{tmp_path}/other/*.tar"])) == 5


def test_a_shard_with_another_count_than_the_card(shard_folder):
    folder = shard_folder(3, card=True)
    card = json.loads((folder / "dataset.json").read_text())
    card["shards"]["train-0000.tar"] = 4
    (folder / "dataset.json").write_text(json.dumps(card))
    with refused("train-0000.tar holds 3 samples, the dataset.json beside it says 4"):
        keys(build(f"{folder}/*.tar"))


def test_a_card_that_cannot_be_used(shard_folder):
    folder = shard_folder(1)
    (folder / "dataset.json").write_text('{"name": "x", "classes": []}')
    with refused("dataset.json cannot be used: classes: Tuple should have at least 1 item"):
        build(f"{folder}/*.tar")
    (folder / "dataset.json").write_text("{")
    with refused("dataset.json is damaged, expected the card of a dataset"):
        build(f"{folder}/*.tar")
    (folder / "dataset.json").write_text(json.dumps({"name": "x", "classes": ["a"], "shards": {"a.tar": 10**30}}))
    with refused("dataset.json cannot be used: shards.a.tar: Input should be less than or equal to"):
        build(f"{folder}/*.tar")


def test_classes_must_come_from_somewhere(shard_folder):
    with refused("has no dataset.json beside its shards: give the option classes"):
        build(f"{shard_folder(1)}/*.tar", classes=None)


def test_labels_from_json(tmp_path, make_tar, make_png):
    image = make_png(np.zeros((2, 2), np.uint8))
    shard = tmp_path / "a.tar"

    def read(label: bytes):
        shard.write_bytes(make_tar({"x.json": label, "x.jpg": image}))
        return [record.label for record in build(str(shard)).records()]

    assert read(b'{"label": 2, "caption": "a cup"}') == [2]
    with refused(f"sample 'x' of shard {shard} has no number under `label` in its .json"):
        read(b'{"labels": 2}')
    with refused("has no number under `label` in its .json"):
        read(b"not json")
    with refused("has the label True: expected an integer"):
        read(b'{"label": true}')


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"x.cls": b"0"}, "has no image: expected one of .png, .jpg, .jpeg, .webp, found .cls"),
        ({"x.png": b""}, "has no label: expected .cls, or .json with `label`"),
        ({"x.cls": b"3", "x.png": b""}, "has the label 3: with 3 classes, labels are 0 to 2"),
        ({"x.cls": b"-1", "x.png": b""}, "has the label -1: with 3 classes, labels are 0 to 2"),
        ({"x.cls": b"cat", "x.png": b""}, "has the label 'cat': expected an integer"),
        ({"x.cls": b"1.5", "x.png": b""}, "has the label '1.5': expected an integer"),
    ],
)
def test_samples_that_cannot_be_used(tmp_path, make_tar, files, sentence):
    shard = tmp_path / "a.tar"
    shard.write_bytes(make_tar({"good.cls": b"0", "good.png": b"", **files}))
    with refused(f"sample 'x' of shard {shard} {sentence}"):
        keys(build(str(shard)))


def test_patterns_that_match_nothing_tell_what_is_there(tmp_path):
    pattern = f"{tmp_path}/data/train-*.tar"
    with refused(f"no shard matches {pattern}: there is no folder {tmp_path}/data"):
        build(pattern)
    (tmp_path / "data").mkdir()
    with refused(f"no shard matches {pattern}: the folder {tmp_path}/data is empty"):
        build(pattern)
    for name in "gfedcba":
        (tmp_path / "data" / name).touch()
    with refused(f"no shard matches {pattern}: the folder {tmp_path}/data holds a, b, c, d, e and 2 more"):
        build(pattern)
    with refused(f"it is a folder, its shards would be {tmp_path}/data/*.tar"):
        build(f"{tmp_path}/data")
    with refused("need the environment variable WDS_ELSEWHERE, which is not set"):
        build(f"{tmp_path}/train-${{ELSEWHERE}}.tar")
    with refused(f"{tmp_path}/data**.tar"):
        build(f"{tmp_path}/data**.tar")
    with refused("fashion-mnist holds LICENSE, dataset.json"):
        build("embedded:fashion-mnist/test-*.tar.gz")


def test_a_command_that_fails(shard_folder):
    shard = f"{shard_folder(40)}/train-0000.tar"
    with refused("shard pipe:exit 3 is damaged or incomplete after 0 samples: its command ended with exit status 3"):
        keys(build("pipe:exit 3"))
    with refused("its command ended with exit status 4"):
        keys(build(f"pipe:head -c 20000 {shard}; exit 4"))
    with refused("its command ended with exit status 5"):
        keys(build(f"pipe:cat {shard}; exit 5"))
    with refused("shard http://[x.tar cannot be opened: "):
        keys(build("http://[x.tar"))
    with refused("shard nowhere:x.tar cannot be opened: nowhere:x.tar: no gopen handler defined"):
        keys(build("nowhere:x.tar"))


def test_leaving_a_command_early_is_no_error(shard_folder):
    shard = f"{shard_folder(200)}/train-0000.tar"
    records = build(f"pipe:cat {shard} {shard} {shard}").records()
    assert next(records).key == "s000"
    records.close()


def samples_of(path: Path, content: bytes) -> list[dict]:
    path.write_bytes(content)
    return list(read_shard(str(path)))


@pytest.mark.parametrize("packed", [False, True])
def test_a_cut_anywhere_is_noticed(tmp_path, make_tar, packed):
    random = np.random.Generator(np.random.PCG64(0))
    plain = make_tar({f"{i}.{kind}": random.bytes(300) for i in range(2) for kind in ("cls", "png")})
    content = gzip.compress(plain) if packed else plain
    complete = len(content) if packed else 4 * 1024 + 2 * 512  # what follows the end marker is padding
    path = tmp_path / "a.tar"
    expected = samples_of(path, content)
    assert len(expected) == 2
    assert samples_of(path, content[:complete]) == expected
    for end in reversed(range(complete)):
        os.truncate(path, end)
        before = []
        with pytest.raises(UserError, match=r"a\.tar is damaged or incomplete after \d samples") as error:
            before.extend(read_shard(str(path)))
        assert before == expected[: len(before)]
        assert f"after {len(before)} samples" in str(error.value)


def test_a_cut_between_members_lacks_the_end_marker(tmp_path, make_tar):
    path = tmp_path / "a.tar"
    path.write_bytes(make_tar({"a.cls": b"1", "a.png": b"2"})[: 4 * 512])
    with refused(f"shard {path} is damaged or incomplete after 0 samples: the end-of-archive marker is missing"):
        list(read_shard(str(path)))


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_a_damaged_byte_of_a_gzip_or_of_a_header_is_noticed(tmp_path_factory, make_tar, data):
    random = np.random.Generator(np.random.PCG64(0))
    plain = make_tar({f"{i}.{kind}": random.bytes(300) for i in range(3) for kind in ("cls", "png")})
    if data.draw(st.booleans()):
        content = gzip.compress(plain, mtime=0)
        place = data.draw(st.integers(10, len(content) - 1))  # its first ten bytes hold time and system
    else:
        content = plain
        place = 1024 * data.draw(st.integers(0, 5)) + data.draw(st.integers(0, 499))
    damaged = bytearray(content)
    damaged[place] ^= data.draw(st.integers(1, 255))
    path = tmp_path_factory.mktemp("damaged") / "a.tar"
    try:
        found = samples_of(path, bytes(damaged))
    except UserError as error:
        assert f"{path} is damaged or incomplete after" in str(error)  # noqa: PT017
    else:
        assert found == samples_of(path, content)


def test_one_name_twice(tmp_path, make_tar):
    first, second = make_tar({"a.png": b"1"}), make_tar({"a.png": b"2"})
    with refused("after 0 samples: a.png: duplicate file name in tar file"):
        samples_of(tmp_path / "a.tar", first[:1024] + second)


def test_other_compressions(tmp_path, make_tar):
    import bz2
    import lzma

    plain = make_tar({"a.cls": b"1", "a.png": b"2"})
    expected = samples_of(tmp_path / "a.tar", plain)
    for name, compress in (("a.tar.bz2", bz2.compress), ("a.tar.xz", lzma.compress)):
        assert samples_of(tmp_path / name, compress(plain)) == expected
        with refused(f"{name} is damaged or incomplete after"):
            samples_of(tmp_path / name, compress(plain)[:-40])


def test_options_are_checked():
    with pytest.raises(ValidationError, match="shuffle_buffer"):
        WebDatasetOptions(shards="x", shuffle_buffer=0)
    with pytest.raises(ValidationError, match="classes"):
        WebDatasetOptions(shards="x", classes=0)
    with pytest.raises(ValidationError, match="shards"):
        WebDatasetOptions(shards=[])


def test_registering_and_choosing_it_loads_nothing_heavy():
    program = (
        "import sys, smalti.core.plugin\n"
        "from smalti.core.data.webdataset import WebDatasetOptions\n"
        "WebDatasetOptions(shards='x')\n"
        "assert not {'torch', 'webdataset', 'PIL'} & set(sys.modules), sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_the_extra_the_sentence_names_it(monkeypatch):
    monkeypatch.setattr(webdataset, "find_spec", lambda name: None)
    with refused("reading tar shards needs the extra smalti-core[data]"):
        build("x")


def test_a_shard_that_went_away(tmp_path):
    with refused("a.tar is damaged or incomplete after 0 samples: No such file or directory"):
        index_shard(f"{tmp_path}/a.tar")
