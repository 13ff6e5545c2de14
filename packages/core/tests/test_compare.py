"""`smalti compare`: every variant of a table trained, measured and timed; one that fails leaves the others."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from smalti.core import compare as module
from smalti.core import step_time
from smalti.core.cli import app
from smalti.core.compare_report import labelled
from smalti.core.contracts import Tokenizer
from smalti.core.data.images import to_uint8
from smalti.core.data.loader import read_images
from smalti.core.errors import UserError
from smalti.core.plugins import registry
from smalti.core.recipe import load_recipe
from smalti.core.step_time import step_times


@pytest.fixture(autouse=True)
def few_timed_updates(monkeypatch):
    for name, value in {"ROUNDS": 1, "WARMUP": 1, "TIMED": 2}.items():
        monkeypatch.setattr(step_time, name, value)


@pytest.fixture
def table(tmp_path, content):
    """Two recipes of two updates that differ in their quantizer, as plain data; call it to write them."""
    content["train"]["tokenizer"]["steps"] = 2
    del content["name"]
    content["variants"] = {
        "four": {"summary": "four bits"},
        "two": {"summary": "two bits", "tokenizer": {"quantizer": {"dim": 2}}},
    }

    def write(**variants):
        content["variants"] |= variants
        path = tmp_path / "signs.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return str(path)

    return write


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The command in this process: arguments to the result."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["compare", *arguments])


def compared(folder):
    return json.loads((folder / "comparison.json").read_text())


def test_a_table_a_picture_and_the_same_for_programs(run, table, tmp_path):
    done = run(table(), "--out", "out", "--images", "20", "--device", "cpu")
    assert (done.exit_code, done.stdout) == (0, "table:    out/comparison.md\n"), done.output
    found = compared(tmp_path / "out")
    assert (found["table"], found["device"]) == ("signs", "cpu")
    assert found["threads"] == torch.get_num_threads()
    assert found["failures"] == {}
    assert list(found["variants"]) == ["four", "two"]
    for name, bits in (("four", 16), ("two", 8)):
        row = found["variants"][name]
        assert (row["bits"], row["steps"], row["batch_size"], row["seed"]) == (bits, 2, 8, 0)
        assert (row["summary"], row["images"]) == (f"{name} bits", 20)
        assert row["step"]["seconds"] > 0
        assert row == row | by_hand(tmp_path / "out" / name, 20)
    lines = (tmp_path / "out" / "comparison.md").read_text().splitlines()
    titles, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert titles == [
        *("variant", "difference, levels", "usage", "perplexity", "bits an image"),
        *("parameters", "updates x images", "ms an update"),
    ]
    assert [row[0] for row in rows] == ["four", "two"]
    assert rows[1][4:7] == ["8", f"{found['variants']['two']['parameters']:,}", "2 x 8"]
    assert "- two: two bits" in lines
    with Image.open(tmp_path / "out" / "comparison.png") as picture:
        assert picture.height == 3 * 64 + 2 * 2


def test_metrics_that_lack_their_weights_are_left_out(run, table, tmp_path, monkeypatch):
    options = registry().options("metric", "difference")
    monkeypatch.setattr(options, "routine", False)
    monkeypatch.setattr(options, "build", lambda _: pytest.fail("nobody asked for it"))
    done = run(table(), "--only", "two", "--out", "out", "--images", "20", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert compared(tmp_path / "out")["definitions"].keys() == {"usage", "perplexity"}


def by_hand(folder, count):
    """The figures of a run's tokenizer, from all images at once."""
    recipe = load_recipe(folder)
    tokenizer = Tokenizer.from_pretrained(folder / "tokenizer")
    dataset = recipe.data.validation.build()
    (batch,) = read_images(dataset, tokenizer.preprocessing, count, 0, count, max_undecodable=0, warn=pytest.fail)
    tokens = tokenizer.encode(batch.images)
    counts = tokens.flatten().bincount().double()
    shares = counts[counts > 0] / counts.sum()
    pair = [to_uint8(images).double() for images in (batch.images, tokenizer.decode(tokens))]
    return {
        "difference": pytest.approx((pair[0] - pair[1]).abs().mean().item(), rel=1e-5),
        "usage": [len(shares) / tokenizer.quantizer.vocab[0]],
        "perplexity": [pytest.approx((-(shares * shares.log()).sum()).exp().item(), rel=1e-5)],
        "parameters": sum(weight.numel() for weight in tokenizer.parameters()),
    }


def test_what_is_trained_is_not_trained_again(run, table, tmp_path):
    assert run(table(), "--only", "two", "--out", "out").exit_code == 0
    assert list(compared(tmp_path / "out")["variants"]) == ["two"]
    assert not (tmp_path / "out" / "four").exists()
    weights = tmp_path / "out" / "two" / "tokenizer" / "model.safetensors"
    before = (weights.stat().st_mtime_ns, compared(tmp_path / "out")["variants"]["two"])
    done = run(table(), "--out", "out")
    assert "train-tokenizer: done before" in done.stderr
    after = compared(tmp_path / "out")["variants"]
    assert list(after) == ["four", "two"]
    assert (weights.stat().st_mtime_ns, after["two"] | {"step": before[1]["step"]}) == before
    done = run(table(), "train.tokenizer.steps=3", "--out", "out")
    assert isinstance(done.exception, UserError)
    assert "holds a run of another recipe (train.tokenizer.steps: 2 there, 3 asked for)" in str(done.exception)
    assert run(table(), "train.tokenizer.steps=3", "--out", "out", "--force").exit_code == 0
    found = compared(tmp_path / "out")
    assert [row["steps"] for row in found["variants"].values()] == [3, 3]
    assert found["overrides"] == ["train.tokenizer.steps=3"]


def test_a_variant_that_fails_leaves_the_others(run, table, content, tmp_path, monkeypatch):
    networks = {part: content["tokenizer"][part] for part in ("name", "preprocessing", "encoder", "decoder")}
    path = table(
        wide={"summary": "", "tokenizer": {"quantizer": {"dim": 99}}},
        away={"summary": "", "data": {"train": {"name": "webdataset", "shards": "nowhere.tar", "classes": 3}}},
        broken={"summary": ""},
        continuous={
            "summary": "",
            **dict.fromkeys(("tokenizer", "generator", "tokenize", "sample", "evaluate")),
            "autoencoder": {**networks, "width": 4},
            "train": {"tokenizer": None, "generator": None, "autoencoder": content["train"]["tokenizer"]},
        },
        ready={
            "summary": "",
            "tokenizer": {"name": "published", "source": "toy", "preprocessing": networks["preprocessing"]},
            "train": {"tokenizer": None},
        },
    )
    measured = module._measured

    def breaks(context, *arguments):
        return 1 / 0 if context.recipe.name == "broken" else measured(context, *arguments)

    monkeypatch.setattr(module, "_measured", breaks)
    done = run(path, "--out", "out")
    assert done.exit_code == 1
    found = compared(tmp_path / "out")
    assert list(found["variants"]) == ["four", "two"]
    assert list(found["failures"]) == ["wide", "continuous", "ready", "away", "broken"]
    assert found["failures"]["continuous"] == "recipe continuous trains no tokenizer, and nothing else is compared"
    assert found["failures"]["ready"] == "recipe ready trains no tokenizer, and nothing else is compared"
    assert found["failures"]["wide"].startswith(f"recipe {path}:wide: tokenizer.quantizer.dim: ")
    assert found["failures"]["away"].startswith("no shard matches nowhere.tar: ")
    assert found["failures"]["broken"] == "ZeroDivisionError: division by zero"
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "| broken | failed |" in text
    assert "- broken failed: ZeroDivisionError: division by zero\n" in text
    assert done.stderr.endswith("smalti: broken failed: ZeroDivisionError: division by zero\n")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    run(path, "--out", "out", "--only", "broken", "--only", "four")
    assert list(compared(tmp_path / "out")["variants"]) == ["four", "broken"]


def test_what_cannot_be_compared(run, table, tmp_path, monkeypatch):
    def told(*arguments):
        done = run(*arguments, "--out", "out")
        assert isinstance(done.exception, UserError), done.output
        assert not (tmp_path / "out").exists()
        return str(done.exception)

    assert told(table(), "--only", "to") == "signs has no variant 'to'; did you mean 'two'?"
    assert told(table(), "--only", "xyz") == "signs has no variant 'xyz'; it has four, two"
    (tmp_path / "one.yaml").write_text("name: one")
    assert told("one.yaml") == (
        "one.yaml has no variants to compare: it is one recipe, a table has several under `variants`"
    )
    assert told("sings").startswith("no table of recipes 'sings': it is neither a file nor one of ")
    assert told(table(), "tokenizer.quantizer.width=3").endswith(":four: tokenizer.quantizer.width: no such option")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert told(table()) == "compare works in one process: start it without torchrun"


def test_an_interruption(run, table, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_measured", stopped)
    done = run(table(), "--only", "two", "--out", "out")
    assert done.exit_code == 130
    assert done.stderr.endswith("smalti: interrupted; the same command goes on from here\n")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_time_of_an_update_is_from_one_to_the_next(table, monkeypatch, accumulate):
    """With a clock that moves by a second whenever it is looked at, once for each micro-batch."""
    ticks = iter(range(10_000))
    for clock in ("process_time", "perf_counter"):
        monkeypatch.setattr(step_time.time, clock, lambda: float(next(ticks)))
    recipe = load_recipe(f"{table()}:two", [f"train.tokenizer.accumulate={accumulate}"])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    found = step_times({"two": recipe}, "cpu")["two"]
    assert (found.seconds, found.updates, found.clock) == (accumulate, step_time.TIMED, "CPU time")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert step_times({"two": recipe}, "cpu")["two"].clock == "wall clock"


def test_all_losses_are_timed_from_the_start(table, monkeypatch):
    seen = []
    adversarial = "{discriminator: {name: patchgan, layers: 1}, learning_rate: 0.001, start: 100}"
    recipe = load_recipe(f"{table()}:two", [f"train.tokenizer.adversarial={adversarial}"])
    monkeypatch.setattr(step_time, "TokenizerTask", lambda tokenizer, options: seen.append(options) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step_times({"two": recipe}, "cpu")
    assert (seen[0].adversarial.start, seen[0].adversarial.discriminator_start) == (0, 0)


def test_frozen_parts_are_not_trained_for_the_time(table, monkeypatch):
    seen = []
    recipe = load_recipe(f"{table()}:two", ["train.tokenizer.freeze=[encoder]"])
    monkeypatch.setattr(step_time, "TokenizerTask", lambda tokenizer, options: seen.append(tokenizer) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step_times({"two": recipe}, "cpu")
    assert not any(weight.requires_grad for weight in seen[0].encoder.parameters())
    assert all(weight.requires_grad for weight in seen[0].decoder.parameters())


def test_rows_of_the_picture():
    """Of two sizes: the smaller ones stand in the upper left."""
    rows = {"large": np.zeros((2, 40, 40, 3), np.uint8), "small": np.full((2, 20, 30, 3), 7, np.uint8)}
    picture = labelled(rows)
    left = picture.shape[1] - 2 * 40 - 2
    assert picture.shape[0] == 2 * 40 + 2
    assert (picture[:40, left : left + 40] == 0).all()
    assert (picture[42:62, left + 42 : left + 72] == 7).all()
    assert (picture[62:, left:] == 255).all()
    label = picture[:40, :left]
    assert label.min() < 128 < label.max() == 255
