import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from smalti.core import recipe as recipe_module
from smalti.core.errors import UserError
from smalti.core.overrides import differences
from smalti.core.plugins import PluginWarning
from smalti.core.recipe import dump_recipe, load_recipe, merged


def told(*arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(*arguments, **options)
    return str(caught.value)


def test_the_resolved_recipe_says_everything_and_loads_again(recipe, tmp_path):
    loaded = load_recipe(recipe)
    again = tmp_path / "recipe.yaml"
    again.write_text(dump_recipe(loaded))
    assert load_recipe(again) == loaded
    assert load_recipe(tmp_path) == loaded
    assert yaml.safe_load(again.read_text())["train"]["generator"]["betas"] == [0.9, 0.95]


def test_overrides(recipe):
    changed = load_recipe(
        recipe,
        [
            "tokenizer.quantizer.dim=2",
            "train.tokenizer.losses.0.weight=0.5",
            "train.generator.learning_rate=3e-4",
            "evaluate=null",
        ],
    )
    assert changed.tokenizer.quantizer.dim == 2
    assert changed.train.tokenizer.losses[0].weight == 0.5
    assert changed.train.generator.learning_rate == 3e-4
    assert changed.evaluate is None
    assert load_recipe(recipe, ["generator=table"]).generator == load_recipe(recipe).generator


def test_an_override_changes_one_place_of_what_is_shared(recipe):
    assert "validation: *id" in recipe.read_text()
    data = load_recipe(recipe, ["data.train.classes=2"]).data
    assert (data.train.classes, data.validation.classes) == (2, 3)


def test_an_override_below_null_or_an_empty_list(recipe, content):
    content["train"]["tokenizer"]["losses"] = [None]
    recipe.write_text(yaml.safe_dump(content))
    assert load_recipe(recipe, ["train.tokenizer.losses.0.name=l1"]).train.tokenizer.losses[0].name == "l1"
    content["train"]["tokenizer"]["losses"] = []
    recipe.write_text(yaml.safe_dump(content))
    assert told(recipe, ["train.tokenizer.losses.0.name=l1"]) == "train.tokenizer.losses.0: the list is empty"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("tokenizer.quantizer.dims=3", "toy.yaml: tokenizer.quantizer.dims: no such option"),
        ("tokenizer.quantizer.name=vqq", "toy.yaml: tokenizer.quantizer: unknown quantizer 'vqq'; installed: signs"),
        ("train.generator.steps=many", "train.generator.steps: Input should be a valid integer"),
        ("train.generator.steps", "'train.generator.steps' is not an override: expected dotted.path=value"),
        ("train.tokenizer.losses.3.weight=1", "train.tokenizer.losses.3: the list has entries 0 to 0"),
        ("tokenize.flip.x=1", "tokenize.flip.x: tokenize.flip is True and has no options"),
        ("nonsense.deep.path=1", "toy.yaml: nonsense: no such option"),
        ("seed={", "seed: '{' is not a YAML value"),
        ("seed=2026-02-31", "seed: '2026-02-31' is not a YAML value"),
        ("train..steps=1", "'train..steps=1' is not an override: expected dotted.path=value"),
        ("data.train.shards=", "data.train.shards"),
    ],
)
def test_wrong_overrides_are_told_with_their_path(recipe, override, sentence):
    assert sentence in told(recipe, [override])


def test_a_recipe_that_is_not_there(tmp_path):
    assert told("qickstart").startswith("no recipe 'qickstart': it is neither a file nor one of ")
    assert told(tmp_path) == f"{tmp_path} is not a run folder: it has no recipe.yaml"


DEEP = "a: " + "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    "text", ["a: [1", "- 1\n- 2", "\x00", DEEP, "a: !!timestamp 99999-99-99", "a: 2026-02-31", "a: *b"]
)
def test_unreadable_files(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert told(path).startswith(f"{path} is not ")


def test_a_recipe_of_a_plugin_that_is_not_installed(recipe, content):
    content["generator"] = {"name": "diffusion-forest", "trees": 3}
    recipe.write_text(yaml.safe_dump(content))
    assert told(recipe) == f"recipe {recipe}: generator: unknown generator 'diffusion-forest'; installed: table"


def test_differences():
    old, new = {"a": {"b": 1, "c": [1, {"d": 2}]}, "e": 1}, {"a": {"b": 2, "c": [1, {"d": 3}]}, "f": 1}
    assert differences(old, new) == [
        "a.b: 1 there, 2 asked for",
        "a.c.1.d: 2 there, 3 asked for",
        "e: 1 there, None asked for",
        "f: None there, 1 asked for",
    ]
    assert differences(old, old) == []


@pytest.fixture
def table(tmp_path, content) -> Path:
    """Two recipes that differ in their quantizer."""
    del content["name"]
    content["variants"] = {
        "two": {"summary": "two bits", "tokenizer": {"quantizer": {"dim": 2}}},
        "four": {"checkpoint": "llamagen-vq-ds16"},
    }
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_table_of_recipes(table):
    two, four = (load_recipe(f"{table}:{name}") for name in ("two", "four"))
    assert (two.name, two.summary, two.tokenizer.quantizer.dim) == ("two", "two bits", 2)
    assert (four.name, four.summary, four.tokenizer.quantizer.dim) == ("four", "for tests", 4)
    assert four.tokenizer.encoder == two.tokenizer.encoder
    assert four.figures["PSNR"] == 20.79
    assert load_recipe(f"{table}:four", ["figures.PSNR=1"]).figures == {"PSNR": 1}
    assert told(table) == f"{table} holds several recipes: name one as {table}:NAME, of four, two"
    assert told(f"{table}:five").startswith(f"{table} holds several recipes")
    assert told(f"{table}:two", ["tokenizer.quantizer.dims=3"]).startswith(
        f"recipe {table}:two: tokenizer.quantizer.dims: "
    )
    assert told(f"{table}:two", ["checkpoint=llamagen"]).startswith("no model 'llamagen' in the zoo")


@pytest.fixture
def parts(tmp_path, recipe, content) -> dict:
    """Two recipes, of whose tokenizer and generator a third one is made."""
    data = {"name": "webdataset", "shards": "elsewhere.tar", "classes": 2}
    other = {
        **content,
        "seed": 7,
        "source": "a paper",
        "data": {"train": data, "validation": data},
        "tokenizer": {"name": "published", "source": "elsewhere", "preprocessing": {"image_size": 8}},
        "train": {"generator": {**content["train"]["generator"], "steps": 99}},
        "sample": {"count": 5},
    }
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    return {"tokenizer": str(recipe), "generator": str(tmp_path / "other.yaml")}


def composed_of(parts, tmp_path, **changes) -> Path:
    path = tmp_path / "system.yaml"
    path.write_text(yaml.safe_dump({"name": "system", "summary": "both", "parts": parts, **changes}))
    return path


def test_a_recipe_of_the_parts_of_two(parts, recipe, tmp_path):
    changes = {"train": {"generator": {"batch_size": 4}}, "sample": {"grid_columns": 3}}
    system, one, two = (
        load_recipe(composed_of(parts, tmp_path, **changes), ["train.tokenizer.losses.0.weight=0.5"]),
        load_recipe(recipe),
        load_recipe(parts["generator"]),
    )
    assert (system.name, system.summary, system.source, system.evaluate) == ("system", "both", "a paper", None)
    assert (system.seed, system.data, system.tokenizer) == (one.seed, one.data, one.tokenizer)
    assert (system.generator, system.tokenize) == (two.generator, two.tokenize)
    assert system.train.tokenizer.losses[0].weight == 0.5
    assert system.train.tokenizer.steps == one.train.tokenizer.steps
    assert (system.train.generator.steps, system.train.generator.batch_size) == (99, 4)
    assert (system.sample.count, system.sample.grid_columns) == (5, 3)


def test_parts_that_are_none(parts, recipe, content, tmp_path):
    expected = "parts: expected the names of two recipes, {tokenizer: ..., generator: ...}, not "
    assert told(composed_of("toy", tmp_path)).startswith(expected)
    assert told(composed_of({"tokenizer": str(recipe)}, tmp_path)).startswith(expected)
    assert told(composed_of({**parts, "generator": "nothing"}, tmp_path)).startswith("no recipe 'nothing': ")
    wrong = composed_of({**parts, "tokenizer": parts["generator"]}, tmp_path)
    assert told(wrong) == f"parts.tokenizer: the recipe {parts['generator']} trains no tokenizer of its own"
    content["generator"], content["train"]["generator"] = None, None
    recipe.write_text(yaml.safe_dump(content))
    wrong = composed_of({**parts, "generator": str(recipe)}, tmp_path)
    assert told(wrong) == f"parts.generator: the recipe {recipe} trains no generator of its own"


@pytest.mark.parametrize("variants", ["[one, two]", "{}", "{one: 1}"])
def test_variants_that_change_nothing_we_can_read(table, variants):
    table.write_text(f"variants: {variants}")
    assert told(f"{table}:one") == f"{table} is not a table of recipes: variants should map names to what they change"


def test_variants_whose_names_are_numbers(table, content):
    content["variants"] = {512: {}, 1024: {"tokenizer": {"quantizer": {"dim": 2}}}}
    table.write_text(yaml.safe_dump(content))
    recipe = load_recipe(f"{table}:1024")
    assert (recipe.name, recipe.tokenizer.quantizer.dim) == ("1024", 2)
    assert told(table).endswith(f"name one as {table}:NAME, of 512, 1024")


def test_merged():
    old = {"a": {"name": "x", "b": 1, "c": [1, 2]}, "d": 1}
    assert merged(old, {"a": {"b": 2}}) == {"a": {"name": "x", "b": 2, "c": [1, 2]}, "d": 1}
    assert merged(old, {"a": {"name": "x", "c": [3]}})["a"] == {"name": "x", "b": 1, "c": [3]}
    assert merged(old, {"a": {"name": "y"}}) == {"a": {"name": "y"}, "d": 1}
    assert merged(old, {"a": None, "e": 1}) == {"a": None, "d": 1, "e": 1}


def test_a_recipe_that_ends_with_the_tokenizer(recipe):
    loaded = load_recipe(recipe, ["generator=null", "train.generator=null", "tokenize=null", "sample=null"])
    assert loaded.section("train.generator") is None
    assert loaded.section("generator.name") is None
    assert told(recipe, ["generator=null"]).endswith(
        "generator and train.generator belong together: give both or neither"
    )


def test_a_generator_brings_the_sections_that_it_needs(recipe, content):
    del content["tokenize"], content["sample"]
    recipe.write_text(yaml.safe_dump(content))
    assert load_recipe(recipe).tokenize.shard_size == 10_000
    assert load_recipe(recipe).sample.count == 50_000


def test_values_that_are_vast_are_shown_in_short(recipe):
    """Aliases make a billion entries of a few lines."""
    names = "abcdefghij"
    lists = [f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in pairwise(names)]
    lines = [f"a: &a [{', '.join('x' * 9)}]", *lists, "seed: *j"]
    recipe.write_text("\n".join(lines))
    sentence = told(recipe)
    assert sentence.startswith(f"recipe {recipe}: ")
    assert len(sentence) < 1500


def test_a_recipe_that_another_plugin_hides(tmp_path, monkeypatch):
    class Two:
        def names(self, kind):
            return ["first", "second"]

        def load(self, kind, name):
            return SimpleNamespace(__path__=[str(tmp_path / name)])

    for folder in Two().names("recipes"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.yaml").write_text("name: mine")
    monkeypatch.setattr(recipe_module, "registry", Two)
    first, second = (tmp_path / folder / "mine.yaml" for folder in ("first", "second"))
    sentence = f"recipe 'mine' of {second} is hidden by the one of {first}"
    with pytest.warns(PluginWarning, match=f"^{re.escape(sentence)}$"):
        assert recipe_module.shipped_recipes() == {"mine": first}
