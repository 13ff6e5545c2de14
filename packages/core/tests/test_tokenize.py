"""Views of images and stored tokens become token shards, the same on any number of processes."""

import json

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from smalti.core.contracts import Tokenizer
from smalti.core.data.decode import decode_ten_crops
from smalti.core.data.token_batches import TokenBatches
from smalti.core.data.token_shards import read_token_shards
from smalti.core.errors import UserError
from smalti.core.progress import Reporter
from smalti.core.recipe import Recipe
from smalti.core.run_folder import RunFolder
from smalti.core.stage import Context
from smalti.core.stages.tokenize import Tokenize
from smalti.core.stages.train_generator import TrainGenerator
from smalti.core.testing.processes import run_in_processes


def tokenized(rank, content, folder):
    recipe = Recipe.model_validate({**content, "evaluate": None})
    Tokenize(Context(RunFolder(folder), recipe, "cpu", Reporter(quiet=True))).run()


@pytest.fixture
def run(content, tmp_path):
    """A run folder with an untrained tokenizer."""

    def run(name="run", seed=0):
        torch.manual_seed(seed)
        folder = RunFolder(tmp_path / name)
        Recipe.model_validate(content).tokenizer.build().save_pretrained(folder / "tokenizer")
        return folder

    return run


def png_sets(content):
    """The images of the recipe, in order."""
    import tarfile

    with tarfile.open(content["data"]["train"]["shards"]) as tar:
        return [tar.extractfile(name).read() for name in sorted(tar.getnames()) if name.endswith("png")]


def test_ten_crops_of_two_ranges(content, run):
    folder = run()
    content["tokenize"] = {"batch_size": 7, "shard_size": 10, "ten_crops": [1.5, 1.25]}
    tokenized(0, content, folder.path)
    found = read_token_shards(folder / "tokens")
    assert len(found.views) == len(set(found.views)) == 20
    assert found.views[5] == "mirrored top left of 1.5"
    tokenizer = Tokenizer.from_pretrained(folder / "tokenizer")
    for number, image in enumerate(png_sets(content)):
        crops = [decode_ten_crops(image, tokenizer.preprocessing, crop_range=crops) for crops in (1.5, 1.25)]
        images = torch.from_numpy(np.concatenate(crops)).float() / 127.5 - 1
        with torch.no_grad():
            assert np.array_equal(found.tokens[number], tokenizer.encode(images).numpy())
    # The generator sees one view of each image in an epoch, and not always the same.
    batches = TokenBatches(found, len(found), seed=0, rank=0, world_size=1)
    tokens = {bytes(view.tobytes()) for views in found.tokens.astype(np.int64) for view in views}
    epochs = [next(batches).tokens for _ in range(2)]
    assert all(bytes(row.numpy().tobytes()) in tokens for epoch in epochs for row in epoch)


@pytest.mark.slow
def test_two_processes_go_on_and_make_the_same_shards(content, run):
    one, two = run("one"), run("two")
    content["tokenize"] = {"batch_size": 4, "shard_size": 5, "ten_crops": [1.5]}
    tokenized(0, content, one.path)
    tokenized(0, content, two.path)
    for name in ("layout.json", "tokens-000000.tar", "tokens-000003.tar"):
        (two / "tokens" / name).unlink()
    kept = (two / "tokens" / "tokens-000001.tar").stat().st_mtime_ns
    run_in_processes(tokenized, content, str(two.path))
    assert (two / "tokens" / "tokens-000001.tar").stat().st_mtime_ns == kept
    for path in (one / "tokens").iterdir():
        assert (two / "tokens" / path.name).read_bytes() == path.read_bytes()


def test_stored_tokens_train_a_generator_of_this_tokenizer_only(content, run, tmp_path):
    folder = run()
    layout = Tokenizer.from_pretrained(folder / "tokenizer").layout()
    tokens = np.random.default_rng(0).integers(0, layout.vocab[0], (24, layout.positions))
    lines = [json.dumps({"class_id": number % 3, "tokens": row.tolist()}) for number, row in enumerate(tokens)]
    (tmp_path / "tokens.jsonl").write_text("\n".join(lines) + "\n")
    content["tokenize"] = {"shard_size": 10, "stored": {"name": "jsonl", "path": "tokens.jsonl", "classes": 3}}
    content["tokenize"]["stored"]["path"] = str(tmp_path / "tokens.jsonl")
    tokenized(0, content, folder.path)
    found = read_token_shards(folder / "tokens")
    assert np.array_equal(found.tokens[:, 0, :, 0], tokens)
    assert found.labels.tolist() == [0, 1, 2] * 8
    recipe = Recipe.model_validate({**content, "evaluate": None})
    folder.state.mkdir()
    TrainGenerator(Context(folder, recipe, "cpu", Reporter(quiet=True))).run()
    other = run("other", seed=1)
    (other / "tokens").symlink_to(folder / "tokens")
    with pytest.raises(UserError, match=r"were made by another tokenizer \(\w+, this one is \w+\): run `"):
        TrainGenerator(Context(other, recipe, "cpu", Reporter(quiet=True))).run()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"flip": True, "ten_crops": [1.1]}, "ten_crops has mirror images already: leave flip out"),
        (
            {"flip": True, "stored": {"name": "jsonl", "path": "x"}},
            "stored tokens have the views that they were",
        ),
        ({"ten_crops": [0.9]}, "Input should be greater than or equal to 1"),
    ],
)
def test_views_that_do_not_go_together(content, options, sentence):
    with pytest.raises(ValidationError, match=sentence):
        Recipe.model_validate({**content, "tokenize": options})
