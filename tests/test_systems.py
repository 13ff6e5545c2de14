"""The whole systems in small: each by one command, interrupted in every stage, with the files of an undisturbed run."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from smalti.core import files as core_files
from smalti.core.contracts import Generator, Tokenizer
from smalti.core.data.token_shards import read_token_shards
from smalti.core.recipe import find_recipe, load_recipe, read_recipes
from smalti.eval.figures import Figure

PAGE = Path(__file__).parents[1] / "docs" / "systems.md"
TABLE, _ = find_recipe("vqvae-ar")
SYSTEMS = read_recipes(TABLE)
# In each stage the file in whose writing the interruption comes, and how often it is written before.
INTERRUPTIONS = {
    "train-tokenizer": ("state/train-tokenizer.pt", 1),
    "tokenize": ("tokens/tokens-000001.tar", 0),
    "train-generator": ("state/train-generator.pt", 1),
    "sample": ("samples/chunks/000001.npy", 0),
    "evaluate": ("evaluation/results.json", 0),
}


@pytest.fixture
def interrupt(monkeypatch):
    """Have Ctrl-C come while a file is written, after so many whole writes of it."""
    sync = os.fsync

    def interrupt(path, before):
        left = [before]

        def fsync(descriptor):
            if Path(f"/proc/self/fd/{descriptor}").readlink() == path.with_name(f".{path.name}{core_files.TEMPORARY}"):
                if left[0] == 0:
                    monkeypatch.setattr(core_files.os, "fsync", sync)
                    raise KeyboardInterrupt
                left[0] -= 1
            sync(descriptor)

        monkeypatch.setattr(core_files.os, "fsync", fsync)

    return interrupt


def run_undisturbed_and_interrupted(name, folder, in_small, interrupt):
    """Two run folders of a system, the second one of a run that was interrupted in every stage."""
    # One after the other in the same place: the recipe names the files of random networks by their path.
    run, whole = folder / "run", folder / "whole"
    code, said = in_small("run", name, out=run)
    assert code == 0, said
    run.rename(whole)
    for stage, (file, before) in INTERRUPTIONS.items():
        interrupt(run / file, before)
        code, said = in_small("run", name, out=run)
        assert code == 130, (stage, said)
        assert said.endswith("smalti: interrupted; the same command goes on from here\n")
        known = json.loads((run / "state" / "stages.json").read_text())
        assert list(known) == list(INTERRUPTIONS)[: len(known)]
        assert [stage for stage, facts in known.items() if not facts["done"]] == [stage]
    code, said = in_small("run", name, out=run)
    assert code == 0, said
    assert said.count("done before") == len(INTERRUPTIONS) - 1
    return whole, run


@pytest.mark.slow
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_from_images_to_a_report(name, tmp_path, in_small, interrupt, files):
    whole, resumed = run_undisturbed_and_interrupted(name, tmp_path, in_small, interrupt)
    assert files(resumed) == files(whole)

    recipe, layout = load_recipe(name), read_token_shards(whole / "tokens").layout
    tokenizer, generator = (
        Tokenizer.from_pretrained(whole / "tokenizer"),
        Generator.from_pretrained(whole / "generator"),
    )
    assert type(tokenizer.options) is type(recipe.tokenizer)
    assert type(generator.options) is type(recipe.generator)
    assert tokenizer.layout() == layout == generator.token_layout
    samples, size = np.load(whole / "samples" / "samples.npz"), tokenizer.preprocessing.image_size
    assert samples["arr_0"].shape == (20, size, size, 3)
    assert samples["arr_0"].std() > 0
    assert samples["arr_1"].tolist() == [0, 1] * 10
    with Image.open(whole / "samples" / "grid.png") as grid:
        assert grid.width > grid.height  # ten samples of a class in a row, two rows

    report, summary = (whole / "report.html").read_text(), json.loads((whole / "summary.json").read_text())
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", report), "the report must need no other file"
    measured = json.loads((whole / "evaluation" / "results.json").read_text())["figures"]
    figures = [Figure(name=known, title=known, **facts).text() for known, facts in measured.items()]
    assert len(figures) >= 10
    for part in (f"{name}-shrunk", "dark", "light", "Fréchet distance", *figures):
        assert part in report, part
    assert all(np.isfinite(value) for value in summary.values())


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_page_tells_what_the_recipe_does(name):
    recipe, text = load_recipe(name), " ".join(PAGE.read_text().split())
    tokenizer = load_recipe(SYSTEMS[name]["parts"]["tokenizer"])
    assert f"`{name}`" in text
    for training in (recipe.train.tokenizer, recipe.train.generator):
        assert re.search(rf"{training.steps:,} (updates )?of {training.batch_size}\b", text), training.steps
    for figure in ({"rFID": tokenizer.figures["rFID"]}, recipe.figures or {}):
        for known, value in figure.items():
            assert f"{known} {value:g}" in text, (known, value)
