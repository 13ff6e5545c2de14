"""Looks at held-out images in the midst of generator training."""

import numpy as np
import pytest
from PIL import Image

from smalti.core.pipeline import Pipeline
from smalti.core.progress import Reporter
from smalti.core.recipe import Recipe
from smalti.core.run_folder import RunFolder
from smalti.core.stage import Context


@pytest.fixture
def trained(content, tmp_path):
    """The folder of a run of the tests' recipe with other options of generator training."""

    def trained(name, **changes):
        train = {**content["train"], "generator": content["train"]["generator"] | {"steps": 4} | changes}
        train["tokenizer"] = train["tokenizer"] | {"steps": 2}
        recipe = Recipe.model_validate({**content, "train": train, "evaluate": None})
        run = RunFolder(tmp_path / name)
        with run.locked():
            run.prepare(recipe)
            pipeline = Pipeline(Context(run, recipe, "cpu", Reporter(quiet=True)))
            pipeline.run(["train-tokenizer", "tokenize", "train-generator"])
        return run

    return trained


def test_losses_with_both_weights_and_pictures_of_fixed_classes(trained):
    looks = {"every": 2, "images": 5, "batch_size": 2, "pictures": 6}
    run, plain = trained("run", validation=looks), trained("plain")
    weights = [folder / "generator" / "model.safetensors" for folder in (run, plain)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    found = [line["validation"] for line in run.metrics("train-generator") if "validation" in line]
    assert len(found) == 2
    for look in found:
        assert look.keys() == {"weights", "ema"}
        assert look["weights"].keys() == look["ema"].keys() == {"cross_entropy"}
    assert found[0]["weights"] != found[1]["weights"]
    assert found[1]["weights"] != found[1]["ema"]
    pictures = sorted(path.name for path in (run / "drawn").iterdir())
    assert pictures == ["00000002.png", "00000004.png"]
    # two rows, for the toy's images are of 8 pixels, 16 times as large, with a gap between
    assert np.asarray(Image.open(run / "drawn" / pictures[0])).shape == (2 * 128 + 2, 5 * 128 + 4 * 2, 3)


def test_without_an_average_and_pictures(trained):
    run = trained("run", ema_decay=None, validation={"every": 4, "images": 3, "pictures": 0})
    (look,) = [line["validation"] for line in run.metrics("train-generator") if "validation" in line]
    assert look.keys() == {"weights"}
    assert not (run / "drawn").exists()
