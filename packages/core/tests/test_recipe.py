import pytest
import yaml

from smalti.core.errors import UserError
from smalti.core.overrides import differences
from smalti.core.recipe import dump_recipe, load_recipe


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


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("tokenizer.quantizer.dims=3", "recipe toy: tokenizer.quantizer.dims: no such option"),
        ("tokenizer.quantizer.name=vqq", "recipe toy: tokenizer.quantizer: unknown quantizer 'vqq'; installed: signs"),
        ("train.generator.steps=many", "train.generator.steps: Input should be a valid integer"),
        ("train.generator.steps", "'train.generator.steps' is not an override: expected dotted.path=value"),
        ("train.tokenizer.losses.3.weight=1", "train.tokenizer.losses.3: the list has entries 0 to 0"),
        ("tokenize.flip.x=1", "tokenize.flip.x: tokenize.flip is True and has no options"),
        ("nonsense.deep.path=1", "recipe toy: nonsense: no such option"),
        ("seed={", "seed: '{' is not a YAML value"),
        ("data.train.shards=", "data.train.shards"),
    ],
)
def test_wrong_overrides_are_told_with_their_path(recipe, override, sentence):
    assert sentence in told(recipe, [override])


def test_a_recipe_that_is_not_there(tmp_path):
    assert told("qickstart").startswith("no recipe 'qickstart': it is neither a file nor one of ")
    assert told(tmp_path) == f"{tmp_path} is not a run folder: it has no recipe.yaml"


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2", "\x00"])
def test_unreadable_files(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert told(path).startswith(f"{path} is not ")


def test_a_recipe_of_a_plugin_that_is_not_installed(recipe, content):
    content["generator"] = {"name": "diffusion-forest", "trees": 3}
    recipe.write_text(yaml.safe_dump(content))
    assert told(recipe) == "recipe toy: generator: unknown generator 'diffusion-forest'; installed: table"


def test_differences():
    old, new = {"a": {"b": 1, "c": [1, {"d": 2}]}, "e": 1}, {"a": {"b": 2, "c": [1, {"d": 3}]}, "f": 1}
    assert differences(old, new) == [
        "a.b: 1 there, 2 asked for",
        "a.c.1.d: 2 there, 3 asked for",
        "e: 1 there, None asked for",
        "f: None there, 1 asked for",
    ]
    assert differences(old, old) == []
