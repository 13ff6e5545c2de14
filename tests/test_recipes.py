"""Every recipe that comes with smalti: it is what its source says, and a tiny copy of it trains."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from smalti.core import recipes
from smalti.core.checkpoints.zoo import zoo, zoo_model
from smalti.core.contracts import Generator
from smalti.core.pipeline import Pipeline
from smalti.core.progress import Reporter
from smalti.core.recipe import load_recipe, read_recipes, shipped_recipes
from smalti.core.run_folder import RunFolder
from smalti.core.shrink import from_scratch, shrunk
from smalti.core.stage import Context

# Read as plain data: components are looked up when a test runs, not when it is collected.
(FOLDER,) = map(Path, recipes.__path__)
SHIPPED = {name or path.stem: content for path in FOLDER.glob("*.yaml") for name, content in read_recipes(path).items()}
NAMES = sorted(SHIPPED)
# Those that reproduce no source.
OURS = {"quickstart", "gaussians", "cifar10-far", "cifar10-var", *read_recipes(FOLDER / "quantizers-cifar10.yaml")}


# Their sources publish none.
WITHOUT_FIGURES = {"llamagen-xxl-256", "llamagen-3b-256", "far-b-triple", "far-l-triple", "sejal1d-gpt"}
# Whole systems, made of the tokenizer of one recipe and the generator of another; tests/test_systems.py runs them.
SYSTEMS = [name for name in NAMES if "parts" in SHIPPED[name]]
# The models that are trained last: generators over published tokenizers, and all others.
GENERATORS = [name for name in NAMES if SHIPPED[name].get("tokenizer", {}).get("name") == "published"]
TOKENIZERS = [name for name in NAMES if name not in GENERATORS + SYSTEMS]
# Rows of RAR's tables that it never reads (positions beyond the sequence's, and times): no part of it here.
UNREAD = {"rar": 2145}


def model_of(recipe):
    """Options of the tokenizer or the autoencoder of a recipe, and of its training."""
    return recipe.tokenizer or recipe.autoencoder, recipe.train.tokenizer or recipe.train.autoencoder


def test_all_of_them_are_found_by_name():
    assert sorted(shipped_recipes()) == NAMES


@pytest.mark.parametrize("name", [name for name in NAMES if "cifar10-" in name])
def test_shards_of_cifar10_are_those_that_the_command_makes(name, tmp_path, monkeypatch):
    """`smalti shards make FOLDER cifar10` makes fifty, of 1,000 images each."""
    for number in range(50):
        (tmp_path / f"train-{number:06d}.tar").touch()
    monkeypatch.setenv("WDS_CIFAR10", str(tmp_path))
    data = load_recipe(name).data
    assert not set(data.train.build().shards) & set(data.validation.build().shards)


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_says_where_it_is_from(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    if name in OURS:
        return
    assert recipe.source
    assert recipe.seed in (0, 23, 42, 8888)
    assert recipe.figures or name in {*WITHOUT_FIGURES, *SYSTEMS} or "stage1" in name or "mini-imagenet" in name
    assert model_of(recipe)[0].preprocessing.image_size in (32, 64, 128, 256, 384)


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if "checkpoint" in SHIPPED[name]])
def test_the_model_is_the_published_one(name):
    recipe = load_recipe(name)
    published = zoo_model(recipe.checkpoint)
    options, _ = model_of(recipe)
    options = type(options).model_validate(from_scratch(options.model_dump(mode="json")))
    with torch.device("meta"):
        model = options.build()
    assert model.kind == published.kind
    if published.kind == "tokenizer":
        assert model.layout() == published.tokens
    else:
        assert (*model.latent_space(), model.width) == published.latents
    assert recipe.figures == {figure.name: figure.value for figure in published.figures}
    count = sum(parameter.numel() for parameter in model.parameters())
    if published.parameters is not None:
        assert count == pytest.approx(published.parameters, rel=1.2e-3)  # most are rounded to three digits


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if "-l2-" in name])
def test_codes_of_unit_length_are_imported_as_they_are_trained(name):
    recipe = load_recipe(name)
    trained = recipe.tokenizer.quantizer
    assert trained.cosine
    overrides = zoo_model(recipe.checkpoint).overrides
    assert overrides == ("quantizer.cosine=true", f"quantizer.unit_length={trained.unit_length}")


@pytest.mark.parametrize("name", [name for name in GENERATORS if "checkpoint" in SHIPPED[name]])
def test_the_generator_is_the_published_one(name):
    recipe = load_recipe(name)
    published = zoo_model(recipe.checkpoint)
    assert recipe.tokenizer.source == published.tokenizer
    assert recipe.tokenizer.preprocessing.image_size == published.resolution
    options = recipe.generator
    if options.name == "var":  # the width of codes, which it takes from its tokenizer
        options = options.model_copy(update={"code_width": 32 * published.tokens.streams})
    with torch.device("meta"):
        model = options.build(published.tokens, 1000)
    count = sum(parameter.numel() for parameter in model.parameters())
    count += UNREAD.get(options.name, 0) * options.dim
    # Most are rounded to four digits; FAR's with two branches are smaller in the paper than in the code.
    rounding = 5.1e-3 if name.endswith("-dual") else 5e-4
    assert count == pytest.approx(published.parameters, rel=rounding)
    assert recipe.figures == {figure.name: figure.value for figure in published.figures}


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_is_the_tokenizer_and_the_generator_that_it_names(name):
    recipe, parts = load_recipe(name), SHIPPED[name]["parts"]
    tokenizer, generator = load_recipe(parts["tokenizer"]), load_recipe(parts["generator"])
    assert (recipe.seed, recipe.data, recipe.tokenizer) == (tokenizer.seed, tokenizer.data, tokenizer.tokenizer)
    assert recipe.train.tokenizer == tokenizer.train.tokenizer
    if recipe.checkpoint is None:  # then the two are no published pair, and figures would be those of another
        assert recipe.figures is None
    else:
        assert zoo_model(recipe.checkpoint).tokenizer == tokenizer.checkpoint
        assert (recipe.generator, recipe.train.generator) == (generator.generator, generator.train.generator)
        assert (recipe.tokenize, recipe.sample) == (generator.tokenize, generator.sample)
        assert recipe.figures == generator.figures
    with torch.device("meta"):
        options = type(recipe.tokenizer).model_validate(from_scratch(recipe.tokenizer.model_dump(mode="json")))
        layout = options.build().layout()
        assert recipe.generator.supports(layout) is None


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Eight pictures of two classes."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for index in range(8):
        path = folder / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 255, (28, 30, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """Train a tiny copy of a recipe's model for two updates; copies that are alike are trained once."""
    random, known = tmp_path_factory.mktemp("random"), {}

    def train(name):
        dataset = f"{{name: folder, path: {images}}}"
        kind = "autoencoder" if "autoencoder" in SHIPPED[name] else "tokenizer"
        recipe = load_recipe(name, [f"data.train={dataset}", f"data.validation={dataset}", f"train.{kind}.steps=2"])
        copy = shrunk(recipe, random, lambda sentence: None)
        content = copy.model_dump(mode="json")
        key = json.dumps([content[kind], content["train"][kind]], default=str)
        if key not in known:
            run = RunFolder(tmp_path_factory.mktemp("run"))
            with run.locked():
                run.prepare(copy)
                Pipeline(Context(run, copy, "cpu", Reporter(quiet=True))).run([f"train-{kind}"])
                known[key] = run.metrics(f"train-{kind}")
        return recipe, known[key]

    return train


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
def test_two_updates_of_a_tiny_copy_go_through_all_losses(trained, name):
    recipe, lines = trained(name)
    _, training = model_of(recipe)
    assert [line["step"] for line in lines] == [1, 2]
    terms = {loss.name for loss in training.losses} - {"perceptual"}
    if training.adversarial is not None:
        terms |= {"adversarial", "discriminator"} | ({"lecam"} if training.adversarial.lecam else set())
    terms |= {"divergence"} if recipe.autoencoder is not None else set()
    assert terms | set(training.ramps) <= lines[-1].keys()
    assert all(math.isfinite(lines[-1][term]) for term in terms)


@pytest.fixture(scope="module")
def generated(images, tmp_path_factory):
    """Train a tiny copy of a recipe's generator for two updates; copies that are alike are trained once."""
    random, known = tmp_path_factory.mktemp("tokenizers"), {}

    def train(name):
        dataset = f"{{name: folder, path: {images}}}"
        overrides = [f"data.train={dataset}", f"data.validation={dataset}", "train.generator.steps=2"]
        copy = shrunk(load_recipe(name, overrides), random, lambda sentence: None)
        content = copy.model_dump(mode="json")
        key = json.dumps([content[part] for part in ("tokenizer", "generator", "train")], default=str)
        if key not in known:
            run = RunFolder(tmp_path_factory.mktemp("run"))
            with run.locked():
                run.prepare(copy)
                pipeline = Pipeline(Context(run, copy, "cpu", Reporter(quiet=True)))
                pipeline.run(["train-tokenizer", "tokenize", "train-generator"])
            known[key] = run
        return known[key]

    return train


@pytest.mark.slow
@pytest.mark.parametrize("name", GENERATORS)
def test_two_updates_of_a_tiny_generator(generated, name):
    recipe, run = load_recipe(name), generated(name)
    lines = run.metrics("train-generator")
    assert [line["step"] for line in lines] == [1, 2]
    generator = Generator.from_pretrained(run / "generator")
    assert type(generator.options) is type(recipe.generator)
    losses = [value for name, value in lines[-1].items() if name.startswith("cross_entropy")]
    assert len(losses) == generator.token_layout.streams
    assert all(map(math.isfinite, losses))
    source = zoo().get(recipe.tokenizer.source)
    if source is not None:
        assert generator.token_layout.kind == source.tokens.kind
        assert generator.token_layout.streams == source.tokens.streams


def test_a_tiny_copy_says_what_it_is_not(tmp_path, monkeypatch):
    for variable in ("IMAGENET_ROOT", "DATASET_ROOT"):
        monkeypatch.delenv(variable, raising=False)
    said = []
    copy = shrunk(load_recipe("titok-bl64-vq8k"), tmp_path, said.append)
    assert said == [
        "shrunk: data.train, imagenet, is not here; Fashion-MNIST takes its place",
        "shrunk: data.validation, imagenet, is not here; Fashion-MNIST takes its place",
        "shrunk: VGG16 is random",
        "shrunk: the loss perceptual is left out: convnext_s has no small size",
    ]
    assert [loss.name for loss in copy.train.tokenizer.losses] == ["l2", "lpips"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lpips.pt", "vgg16.pt"]
    before = (tmp_path / "vgg16.pt").read_bytes()
    (tmp_path / "vgg16.pt").unlink()
    assert shrunk(load_recipe("titok-bl64-vq8k"), tmp_path, said.append) == copy
    assert (tmp_path / "vgg16.pt").read_bytes() == before


def test_a_tiny_copy_of_a_grey_published_tokenizer_takes_colours(tmp_path):
    copy = shrunk(load_recipe("llamagen-b-256", ["tokenizer.preprocessing.channels=1"]), tmp_path, print)
    assert copy.tokenizer.build().preprocessing.channels == 3


def test_a_generator_of_scales_is_looked_at_scale_by_scale(images, tmp_path):
    dataset = f"{{name: folder, path: {images}}}"
    looks = "{every: 2, images: 4, batch_size: 2, pictures: 2}"
    overrides = [f"data.train={dataset}", f"data.validation={dataset}", f"train.generator.validation={looks}"]
    copy = shrunk(load_recipe("imagefolder-var-d17", [*overrides, "train.generator.steps=2"]), tmp_path, print)
    run = RunFolder(tmp_path / "run")
    with run.locked():
        run.prepare(copy)
        pipeline = Pipeline(Context(run, copy, "cpu", Reporter(quiet=True)))
        pipeline.run(["train-tokenizer", "tokenize", "train-generator"])
    found = run.metrics("train-generator")[-1]["validation"]["weights"]
    scales = {f"scale_{scale}_{stream}" for scale in range(10) for stream in range(2)}
    assert found.keys() == scales | {"cross_entropy_0", "cross_entropy_1"}
    assert sorted(path.name for path in (run / "drawn").iterdir()) == ["00000002.png"]
    sizes = torch.tensor([1, 1, 1, 1, 1, 1, 1, 1, 1, 4.0])
    for stream in range(2):
        parts = torch.tensor([found[f"scale_{scale}_{stream}"] for scale in range(10)])
        mean = float((parts * sizes).sum() / sizes.sum())
        assert found[f"cross_entropy_{stream}"] == pytest.approx(mean / 2, rel=1e-4)
