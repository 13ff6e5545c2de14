"""A recipe whose tokenizer was trained elsewhere."""

import pytest
from pydantic import ValidationError

from smalti.core.contracts import Tokenizer
from smalti.core.errors import UserError
from smalti.core.options import TokenizerOptions, sentences
from smalti.core.pipeline import Pipeline
from smalti.core.plugins import registry
from smalti.core.progress import Reporter
from smalti.core.recipe import Recipe
from smalti.core.run_folder import RunFolder
from smalti.core.stage import Context
from smalti.core.weights import fingerprint


@pytest.fixture
def trained(content, tmp_path) -> Tokenizer:
    """A tokenizer in `first/tokenizer`, as a run leaves it."""
    tokenizer = options_of(content["tokenizer"]).build().eval()
    tokenizer.save_pretrained(tmp_path / "first" / "tokenizer")
    return tokenizer


def options_of(config) -> TokenizerOptions:
    return registry().options("tokenizer", config["name"]).model_validate(config)


def published(content, source, size=8, channels=1):
    preprocessing = {"image_size": size, "channels": channels}
    tokenizer = {"name": "published", "source": str(source), "preprocessing": preprocessing}
    return {**content, "tokenizer": tokenizer, "train": {"generator": content["train"]["generator"]}, "evaluate": None}


def test_a_run_takes_it_as_it_is_and_goes_on(content, trained, tmp_path):
    recipe = Recipe.model_validate(published(content, tmp_path / "first", size=16))
    run = RunFolder(tmp_path / "run")
    with run.locked():
        run.prepare(recipe)
        Pipeline(Context(run, recipe, "cpu", Reporter(quiet=True))).run()
    taken = Tokenizer.from_pretrained(run / "tokenizer")
    assert taken.options.name == "composed"
    assert taken.preprocessing == recipe.tokenizer.preprocessing
    assert taken.layout().shape == ((4, 4),)
    before, after = trained.state_dict(), taken.state_dict()
    assert all(before[name].equal(after[name]) for name in before | after)
    assert (run / "samples" / "samples.npz").exists()
    assert run.stages()["train-tokenizer"]["done"]


def test_a_folder_of_weights_will_do(content, trained, tmp_path):
    found = options_of(published(content, tmp_path / "first" / "tokenizer")["tokenizer"]).build()
    assert found.preprocessing.fit == "center-crop"
    same = found.options.model_copy(update={"preprocessing": trained.preprocessing})
    found.options = same
    assert fingerprint(found, found.config()) == fingerprint(trained, trained.config())


def test_what_it_refuses(content, trained, tmp_path):
    def told(recipe):
        with pytest.raises(ValidationError) as raised:
            Recipe.model_validate(recipe)
        return sentences(raised.value)

    whole = published(content, tmp_path / "first")
    assert told({**whole, "train": content["train"]}) == (
        "a published tokenizer is not trained: leave train.tokenizer out, or train one from its start"
    )
    assert told({**content, "train": whole["train"]}) == (
        "tokenizer and train.tokenizer belong together: give both or neither"
    )
    with pytest.raises(UserError, match="nothing-there is neither a folder here nor a hub name"):
        options_of(published(content, "nothing-there")["tokenizer"]).build()
    with pytest.raises(UserError, match="7"):
        options_of(published(content, tmp_path / "first", size=7)["tokenizer"]).build()
    with pytest.raises(UserError, match=r"first takes images of 1 channels, not 3: set preprocessing\.channels$"):
        options_of(published(content, tmp_path / "first", channels=3)["tokenizer"]).build()
