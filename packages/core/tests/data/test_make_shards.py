import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from smalti.core.cli import app
from smalti.core.data.check import check
from smalti.core.data.dataset import Record
from smalti.core.data.decode import decode_whole
from smalti.core.data.folders import FolderOptions
from smalti.core.data.make_shards import ShardSettings, make_shards
from smalti.core.data.webdataset import WebDatasetOptions
from smalti.core.errors import UserError


def refused(sentence):
    return pytest.raises(UserError, match=re.escape(sentence))


def encoded(pixels, kind, **how):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **how)
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path):
    """25 images of two classes: PNG, JPEG, WebP, PPM in turn, of several sizes, some grey."""
    random = np.random.default_rng(0)
    for number in range(25):
        kind, ending = [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"), ("PPM", "ppm")][number % 4]
        shape = (12 + number, 20, 3) if number % 3 else (12 + number, 20)
        path = tmp_path / "photos" / ("a" if number < 10 else "b") / f"{number:02d}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(random.integers(0, 256, shape, np.uint8), kind))
    return tmp_path / "photos"


def make(source, out, warn=pytest.fail, workers=0, max_undecodable=0, advance=lambda _: None, **settings):
    options = FolderOptions(path=str(source))
    return make_shards(
        options.build(),
        out,
        ShardSettings(**settings),
        source=options.model_dump(mode="json"),
        workers=workers,
        max_undecodable=max_undecodable,
        warn=warn,
        advance=advance,
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_shards_hold_what_the_source_holds(photos, tmp_path):
    counts = make(photos, tmp_path / "out", samples=10)
    assert counts == {"train-000000.tar": 10, "train-000001.tar": 10, "train-000002.tar": 5}
    made = WebDatasetOptions(shards=f"{tmp_path}/out/train-*.tar").build()
    assert (made.name, made.classes, len(made)) == ("photos", ("a", "b"), 25)
    source = {record.key: record for record in FolderOptions(path=str(photos)).build().records()}
    records = list(made.records())
    assert [record.key for record in records] != sorted(source)
    assert sorted(record.key for record in records) == sorted(source)
    for record in records:
        expected = source[record.key]
        assert record.label == expected.label
        if expected.image[:2] in (b"P5", b"P6"):  # not among the formats of shards
            assert record.image.startswith(b"\x89PNG")
            assert np.array_equal(decode_whole(record.image, 3), decode_whole(expected.image, 3))
        else:
            assert record.image == expected.image


def test_workers_and_restarts_change_no_byte(photos, tmp_path):
    make(photos, tmp_path / "one", samples=4, encode="png")
    make(photos, tmp_path / "two", samples=4, encode="png", workers=3)
    expected = contents(tmp_path / "one")
    assert contents(tmp_path / "two") == expected

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(photos, tmp_path / "three", samples=4, encode="png", advance=stop)
    (first,) = (tmp_path / "three").glob("*.tar")
    assert (tmp_path / "three" / "making.json").exists()
    written = first.stat().st_mtime_ns
    (tmp_path / "three" / ".train-000001.tar.part").write_bytes(b"of a killed run")
    done = []
    make(photos, tmp_path / "three", samples=4, encode="png", advance=done.append)
    assert contents(tmp_path / "three") == expected
    assert first.stat().st_mtime_ns == written
    assert sum(done) == 25


def test_a_folder_that_is_complete_is_left_alone(photos, tmp_path):
    counts = make(photos, tmp_path / "out", samples=10)
    before = contents(tmp_path / "out")
    assert make(photos, tmp_path / "out", samples=10) == counts
    assert contents(tmp_path / "out") == before


def test_a_folder_with_other_shards_is_refused(photos, tmp_path):
    make(photos, tmp_path / "out", samples=10)
    with refused(f"{tmp_path}/out holds another data set already: give another folder, or remove it first"):
        make(photos, tmp_path / "out", samples=11)
    (tmp_path / "out" / "dataset.json").write_text("[]")
    with refused(f"{tmp_path}/out holds another data set already"):
        make(photos, tmp_path / "out", samples=10)
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "making.json").write_text("{}")
    with refused(f"{tmp_path}/half holds shards of other options, half made: give another folder"):
        make(photos, tmp_path / "half")


def test_the_stored_order_can_be_kept(photos, tmp_path):
    make(photos, tmp_path / "out", samples=10, shuffle=None)
    made = WebDatasetOptions(shards=f"{tmp_path}/out/*.tar").build()
    stored = [record.key for record in FolderOptions(path=str(photos)).build().records()]
    assert [record.key for record in made.records()] == stored


def test_reduced_and_encoded(photos, tmp_path):
    make(photos, tmp_path / "out", short_side=15, encode="jpg", quality=100, name="small", prefix="x")
    made = WebDatasetOptions(shards=f"{tmp_path}/out/x-*.tar").build()
    assert made.name == "small"
    source = {record.key: record.image for record in FolderOptions(path=str(photos)).build().records()}
    for record in made.records():
        with Image.open(io.BytesIO(record.image)) as image, Image.open(io.BytesIO(source[record.key])) as original:
            assert image.format == "JPEG"
            assert (image.mode == "L") == (original.mode == "L")
            width, height = original.size
            short = min(width, height)
            side = min(short, 15)
            assert image.size == (side * width // short, side * height // short)
            reduced = original.convert("RGB").resize(image.size, Image.Resampling.BICUBIC)
            difference = np.abs(np.asarray(reduced).astype(int) - np.asarray(image.convert("RGB")))
            assert difference.mean() < 50  # halved colours of noise; another image would differ by 85
        if short <= 15 and original.format == "JPEG":
            assert record.image == source[record.key]


def test_a_box_is_cut_out(tmp_path, memory_dataset, make_png):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8)
    dataset = memory_dataset(1)
    dataset.items = [Record("a/b.c", make_png(pixels), 1, (1, 2, 6, 8))]
    how = {"source": {}, "workers": 0, "max_undecodable": 0, "warn": pytest.fail, "advance": lambda _: None}
    make_shards(dataset, tmp_path / "out", ShardSettings(), **how)
    (record,) = WebDatasetOptions(shards=f"{tmp_path}/out/*.tar").build().records()
    assert (record.key, record.label) == ("a/b_c", 1)
    assert np.array_equal(decode_whole(record.image, 3), pixels[2:8, 1:6].transpose(2, 0, 1))
    dataset.items = [Record(key, make_png(pixels), 0) for key in ("a.b", "a_b")]
    with refused("two samples in a row have the key 'a_b', in"):
        make_shards(dataset, tmp_path / "twice", ShardSettings(shuffle=None), **how)


def test_damaged_images_are_left_out_as_far_as_allowed(photos, tmp_path):
    (photos / "a" / "00.png").write_bytes(b"broken")
    (photos / "b" / "12.png").write_bytes(b"")
    told = []
    counts = make(photos, tmp_path / "out", told.append, max_undecodable=2, samples=10, encode="png")
    assert sum(counts.values()) == 23
    assert sorted(sentence.partition(":")[0] for sentence in told) == [
        "image 'a/00' cannot be decoded and is left out",
        "image 'b/12' cannot be decoded and is left out",
    ]
    assert not any("0x" in sentence for sentence in told)  # an address, another one each time
    with refused("2 images of photos cannot be decoded and 1 may be left out: mend them or raise --max-undecodable"):
        make(photos, tmp_path / "less", str, max_undecodable=1, samples=10, encode="png")


def test_images_mended_since_a_run_that_was_refused(photos, tmp_path):
    mended = {path: path.read_bytes() for path in (photos / "a" / "00.png", photos / "b" / "12.png")}
    for path in mended:
        path.write_bytes(b"broken")
    with refused("2 images of photos cannot be decoded and 1 may be left out"):
        make(photos, tmp_path / "out", str, max_undecodable=1, samples=10, encode="png", shuffle=None)
    for path, content in mended.items():
        path.write_bytes(content)
    assert sum(make(photos, tmp_path / "out", samples=10, encode="png", shuffle=None).values()) == 25
    make(photos, tmp_path / "whole", samples=10, encode="png", shuffle=None)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_images_left_out_before_a_restart_count(photos, tmp_path):
    for path in (photos / "a" / "00.png", photos / "b" / "12.png"):
        path.write_bytes(b"broken")

    def stop(_):
        raise KeyboardInterrupt

    how = {"max_undecodable": 1, "samples": 10, "encode": "png", "shuffle": None}
    with pytest.raises(KeyboardInterrupt):
        make(photos, tmp_path / "out", str, advance=stop, **how)
    with refused("2 images of photos cannot be decoded and 1 may be left out"):
        make(photos, tmp_path / "out", str, **how)


def test_a_full_folder_of_a_source_that_is_gone(photos, tmp_path):
    (photos / "a" / "00.png").unlink()
    dataset = FolderOptions(path=str(photos)).build()
    (photos / "a" / "01.jpg").unlink()
    how = {"source": {}, "workers": 2, "max_undecodable": 9, "warn": pytest.fail, "advance": lambda _: None}
    with refused(f"{photos}/a/01.jpg does not exist"):
        make_shards(dataset, tmp_path / "out", ShardSettings(samples=5), **how)


@pytest.mark.slow
def test_killed_runs_end_with_the_same_shards(tmp_path):
    source = tmp_path / "many" / "c"
    source.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(60):
        (source / f"{number:02d}.jpg").write_bytes(encoded(random.integers(0, 256, (300, 300, 3), np.uint8), "JPEG"))

    make(source.parent, tmp_path / "whole", samples=4, encode="png")
    out = tmp_path / "killed"
    arguments = ["shards", "make", str(out), "folder", f"path={source.parent}", "--samples", "4", "--encode", "png"]
    process = subprocess.Popen(
        [sys.executable, "-m", "smalti", *arguments],
        env={**os.environ, "SMALTI_PLUGINS": "core"},
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and len(list(out.glob("*.tar"))) < 5:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 5 <= len(list(out.glob("*.tar"))) < 15
    make(source.parent, out, samples=4, encode="png", workers=2)
    assert contents(out) == contents(tmp_path / "whole")


def test_check_counts_and_lists_damage(photos):
    (photos / "a" / "00.png").write_bytes(b"broken")
    content = (photos / "b" / "13.jpg").read_bytes()
    (photos / "b" / "13.jpg").write_bytes(content[:-200])
    dataset = FolderOptions(path=str(photos)).build()
    for workers in (0, 2):
        seen = []
        findings = check(dataset, workers, seen.append)
        assert len(seen) == 25
        assert findings.labels == {0: 9, 1: 14}
        assert [sentence.partition(":")[0] for sentence in findings.damaged] == ["image 'a/00'", "image 'b/13'"]
        first, *others = findings.sentences(dataset)
        assert first == "photos: 23 images of 2 classes, 2 damaged"
        assert others[0] == "  9 to 14 images per class"
        assert others[1].startswith("  23 sizes, from 20x13 to 20x36 pixels")
        assert others[2].startswith("  damaged: image 'a/00': cannot identify image file")


def test_check_tells_of_one_size(shard_folder):
    dataset = WebDatasetOptions(shards=f"{shard_folder(1, 4, 4)}/*.tar", classes=3).build()
    assert re.fullmatch(r"  all of \d+x\d+ pixels", list(check(dataset, 0, lambda _: None).sentences(dataset))[2])


def test_check_goes_on_after_a_damaged_shard(shard_folder):
    folder = shard_folder(3, 2, 4)
    os.truncate(folder / "train-0001.tar", 700)
    findings = check(WebDatasetOptions(shards=f"{folder}/*.tar", classes=3).build(), 0, lambda _: None)
    assert findings.labels.total() == 7
    (sentence,) = findings.damaged
    assert sentence.startswith(f"shard {folder}/train-0001.tar is damaged or incomplete after 0 samples")


@pytest.fixture
def run():
    """A command in this process: arguments to exit code and standard output; a user's mistake is raised."""

    def invoke(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if isinstance(result.exception, UserError):
            raise result.exception
        return result.exit_code, result.stdout

    return invoke


def test_commands(run, photos, tmp_path):
    out = tmp_path / "out"
    code, text = run("shards", "make", out, "folder", f"path={photos}", "--samples", 10, "--workers", 1)
    assert (code, text) == (0, f"25 images in 3 shards: {out}/train-*.tar\n")
    code, text = run("data", "check", "webdataset", f"shards={out}/*.tar")
    assert (code, text.splitlines()[0]) == (0, "photos: 25 images of 2 classes, 0 damaged")
    (photos / "a" / "00.png").write_bytes(b"broken")
    code, text = run("data", "check", "folder", f"path={photos}")
    assert (code, text.splitlines()[0]) == (1, "photos: 24 images of 2 classes, 1 damaged")
    os.truncate(out / "train-000001.tar", 700)
    (out / "dataset.json").write_text('{"name": "cut", "classes": ["a", "b"]}')
    code, text = run("data", "check", "webdataset", f"shards={out}/*.tar")
    assert (code, text.splitlines()[0]) == (1, "cut: 15 images of 2 classes, 1 damaged")


def test_commands_with_mistakes(run, photos, tmp_path):
    with refused("nowhere does not exist, expected a folder with one folder of images per class: there is no"):
        run("data", "check", "folder", "path=/no/nowhere")
    with refused("data set folder: pth: no such option"):
        run("shards", "make", tmp_path / "out", "folder", "pth=x")
    with refused("shards make: encode: Input should be 'keep', 'jpg' or 'png', got 'gif'"):
        run("shards", "make", tmp_path / "out", "folder", f"path={photos}", "--encode", "gif")
    with refused("no recipe 'foldr'"):
        run("data", "check", "foldr")
    with refused("unknown dataset 'foldr'; installed: celeba, cifar10"):
        run("shards", "make", tmp_path / "out", "foldr")


def test_check_needs_no_torch(photos):
    program = (
        "import sys\n"
        "from smalti.core.cli import app\n"
        f"app(['data', 'check', 'folder', 'path={photos}'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_check_of_a_recipe(run, recipe):
    code, text = run("data", "check", recipe)
    assert code == 0
    assert text.count("24 images of 3 classes, 0 damaged") == 1  # both parts of it are the same


def test_the_card_tells_how_the_shards_were_made(photos, tmp_path):
    make(photos, tmp_path / "out", samples=10, encode="jpg")
    card = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert card["made_from"]["source"] == {"name": "folder", "path": str(photos), "labels": "folders"}
    assert card["made_from"]["settings"]["encode"] == "jpg"
    assert not (tmp_path / "out" / "making.json").exists()
