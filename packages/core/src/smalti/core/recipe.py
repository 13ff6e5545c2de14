"""Recipes: one YAML file that says everything a run does, or a table of runs that differ in a few options.

A file is a recipe, with a `name`, or a table: what all its recipes share, and under `variants` what each one changes.
Mappings are merged key by key; anything else takes the place of what the table has, and so does a component of
another name:

    summary: VQ-VAE
    tokenizer: {name: composed, quantizer: {name: vq, dim: 64, codebook_size: 512}, ...}
    variants:
      vqvae-512: {}
      vqvae-1024: {summary: VQ-VAE with more codes, tokenizer: {quantizer: {codebook_size: 1024}}}
      fsqvae-512: {summary: FSQ, tokenizer: {quantizer: {name: fsq, levels: [8, 8, 8]}}}

A recipe may be made of two others, of the tokenizer of one and the generator of the other, and change both:

    parts: {tokenizer: fqgan-dual-ds16, generator: far-b-dual}
    evaluate: {}
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from smalti.core.checkpoints.zoo import zoo_model
from smalti.core.data.augmentation import Augmentation
from smalti.core.data.stored_tokens import ArrayTokens, LineTokens
from smalti.core.errors import UserError
from smalti.core.files import parse_yaml
from smalti.core.options import (
    AutoencoderOptions,
    DatasetOptions,
    GeneratorOptions,
    Options,
    Slot,
    StageOptions,
    TokenizerOptions,
    sentences,
)
from smalti.core.overrides import apply_override
from smalti.core.plugins import PluginWarning, registry
from smalti.core.published_tokenizer import PublishedTokenizerOptions
from smalti.core.sampling_settings import SamplingSettings
from smalti.core.training.options import GeneratorTraining, TokenizerTraining

Data = dict[str, Any]

# What is told of a recipe, and what changes when and where things are computed, looked at or given up, but not what
# comes out: a run goes on with other values.
INCIDENTAL = (
    *("summary", "source", "checkpoint", "figures"),
    *("data.workers", "data.max_undecodable"),
    *(
        f"train.{model}.{option}"
        for model in ("tokenizer", "autoencoder", "generator")
        for option in ("checkpoint_every", "log_every", "max_skipped", "sharding", "trackers")
    ),
)

# What a recipe of two `parts` takes from each, beside the training of it.
PART_KEYS = {"tokenizer": ("seed", "data", "tokenizer"), "generator": ("tokenize", "generator", "sample")}


class DataSection(Options):
    """The images: those that models are fitted to, and held-out ones that they are judged by.

    Args:
        train: for training.
        validation: for judging.
        augment: what chance does to the tokenizer's training images; None fits them as its preprocessing does.
        max_undecodable: images that each process may leave out as damaged, by pass over the data or by shard of tokens;
            of more the stage gives up.
        workers: threads of each process that decode images ahead of time; the images are the same with any number.
    """

    train: Annotated[DatasetOptions, Slot("dataset")]
    validation: Annotated[DatasetOptions, Slot("dataset")]
    augment: Augmentation | None = None
    max_undecodable: Annotated[int, Field(ge=0)] = 100
    workers: Annotated[int, Field(ge=0)] = 0


class TrainSection(Options):
    """How the models are trained, each where the recipe has it.

    Args:
        tokenizer: with `tokenizer`, unless that is a published one.
        autoencoder: with `autoencoder`.
        generator: with `generator`; without, the recipe ends with the tokenizer.
    """

    tokenizer: TokenizerTraining | None = None
    autoencoder: TokenizerTraining | None = None
    generator: GeneratorTraining | None = None


class TokenizeSection(Options):
    """How images become token shards.

    Args:
        batch_size: images encoded at once.
        shard_size: samples of one tar file.
        flip: add the tokens of every image's mirror image as a second view.
        ten_crops: crop ranges; each makes ten views in the place of the whole image: fitted into a square that many
            times as wide, its corners and middle and those of its mirror image (LlamaGen, FQGAN: `[1.1]`, or
            `[1.1, 1.05]`). A generator is shown one view of each image per epoch, drawn at random.
        on_the_fly: make no shards; the generator's training encodes the images of `data.train` itself, one view of
            each in every epoch. It costs the encoding in every epoch, and no disk.
        stored: tokens that another project made with this tokenizer, in the place of tokens of `data.train`.
    """

    batch_size: Annotated[int, Field(ge=1)] = 64
    shard_size: Annotated[int, Field(ge=1)] = 10_000
    flip: bool = False
    ten_crops: tuple[Annotated[float, Field(ge=1)], ...] = ()
    on_the_fly: bool = False
    stored: Annotated[ArrayTokens | LineTokens, Field(discriminator="name")] | None = None

    @model_validator(mode="after")
    def _one_kind_of_views(self) -> Self:
        if self.flip and self.ten_crops:
            raise ValueError("ten_crops has mirror images already: leave flip out")
        if self.stored is not None and (self.flip or self.ten_crops):
            raise ValueError("stored tokens have the views that they were stored with: leave flip and ten_crops out")
        if self.stored is not None and self.on_the_fly:
            raise ValueError("stored tokens are there already: leave on_the_fly out")
        return self


class SampleSection(SamplingSettings):
    """How many images are drawn, of which classes, and how.

    Args:
        classes: numbers or names; sample i is of class i modulo how many these are. None listed are all.
        count: images.
        per_class: images of each class, in the place of `count`; 0 goes by that.
        batch_size: images drawn at once; None takes 64, halved until the predicted peak of memory fits.
        files: also write every image as a file of this kind, to `images/CLASS/NUMBER`.
        grid_columns: images of one class in the PNG grid, which shows the first 20 classes.
    """

    classes: tuple[int | str, ...] = ()
    count: Annotated[int, Field(ge=1)] = 50_000
    per_class: Annotated[int, Field(ge=0)] = 0
    batch_size: Annotated[int, Field(ge=1)] | None = None
    files: Literal["png", "webp"] | None = None
    grid_columns: Annotated[int, Field(ge=1)] = 10


class Recipe(Options):
    """A run from images to evaluated samples, or to a tokenizer only.

    Args:
        name: of the recipe.
        summary: one line for `smalti recipes`.
        source: paper or project that it reproduces.
        checkpoint: the model in the zoo that the source trained with it.
        figures: what the source publishes, by name; None takes those of `checkpoint`.
        seed: of everything random in the run.
        data: the images.
        tokenizer: images to tokens and back.
        autoencoder: in the place of a tokenizer, images to a continuous latent and back; the recipe ends with it.
        generator: draws tokens of a class; None ends the recipe with the tokenizer.
        train: how each of these is trained.
        tokenize: None makes no token shards; with a generator it is there by default.
        sample: None draws no images; with a generator it is there by default.
        evaluate: None measures nothing.
    """

    name: str
    summary: str
    source: str = ""
    checkpoint: str | None = None
    figures: dict[str, float] | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    data: DataSection
    tokenizer: Annotated[TokenizerOptions, Slot("tokenizer")] | None = None
    autoencoder: Annotated[AutoencoderOptions, Slot("autoencoder")] | None = None
    generator: Annotated[GeneratorOptions, Slot("generator")] | None = None
    train: TrainSection
    tokenize: TokenizeSection | None = None
    sample: SampleSection | None = None
    evaluate: Annotated[StageOptions, Slot("stage", "evaluate")] | None = None

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, content: Any) -> Any:
        """The sections that a generator brings."""
        if not isinstance(content, dict) or content.get("generator") is None:
            return content
        return {"tokenize": {}, "sample": {}, **content}

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.tokenizer is None) == (self.autoencoder is None):
            raise PydanticCustomError("missing", "a recipe needs a tokenizer or an autoencoder: give one of them")
        published = isinstance(self.tokenizer, PublishedTokenizerOptions)
        if published and self.train.tokenizer is not None:
            raise PydanticCustomError(
                "missing",
                "a published tokenizer is not trained: leave train.tokenizer out, or train one from its start",
            )
        for name in ("tokenizer", "autoencoder", "generator"):
            if published and name == "tokenizer":
                continue
            if (getattr(self, name) is None) != (getattr(self.train, name) is None):
                raise PydanticCustomError(
                    "missing", "{name} and train.{name} belong together: give both or neither", {"name": name}
                )
        return self

    def decisive(self) -> Data:
        """The recipe as plain data, without what cannot change a run's results."""
        content = self.model_dump(mode="json")
        for path in INCIDENTAL:
            *above, option = path.split(".")
            options: Any = content
            for key in above:
                options = None if options is None else options[key]
            if options is not None:
                del options[option]
        return content

    def section(self, path: str) -> Any:
        """The part of `decisive` at a dotted path; None where the recipe has none."""
        value: Any = self.decisive()
        for key in path.split("."):
            value = None if value is None else value[key]
        return value


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by name, by path, or out of a run folder, with dotted overrides.

    Args:
        source: a name that `smalti recipes` lists, a YAML file, `file.yaml:name` for one of a table, or a folder with
            `recipe.yaml`.
        overrides: `tokenizer.quantizer.codebook_size=1024`; values are YAML.

    Raises:
        UserError: nothing of that name; unreadable YAML; a wrong option, with its dotted path.
    """
    path, name = find_recipe(source)
    content = composed(read_recipes(path)[name])
    for override in overrides:
        apply_override(content, override)
    try:
        return Recipe.model_validate(published(content))
    except ValidationError as error:
        told = path if Path(source).is_dir() else source
        raise UserError(f"recipe {told}: {sentences(error)}") from None


def find_recipe(source: str | Path) -> tuple[Path, str]:
    """The YAML file of a recipe given by name, path or run folder, and the recipe's key in `read_recipes` of it."""
    path = Path(source)
    if path.is_dir():
        if not (path / "recipe.yaml").exists():
            raise UserError(f"{path} is not a run folder: it has no recipe.yaml")
        return path / "recipe.yaml", ""
    file, _, name = str(source).rpartition(":")
    for candidate, wanted in ((path, ""), (Path(file), name)):
        if str(candidate) != "." and candidate.is_file():
            return candidate, _one_of(candidate, wanted)
    named = shipped_recipes()
    if str(source) in named:
        path = named[str(source)]
        return path, _one_of(path, str(source))
    close = difflib.get_close_matches(str(source), named, n=1)
    raise UserError(
        f"no recipe {str(source)!r}: it is neither a file nor one of those that `smalti recipes` lists"
        + (f"; did you mean {close[0]!r}?" if close else "")
    )


def read_recipes(path: Path) -> dict[str, Data]:
    """The recipes of a YAML file as plain data, by name; by "" the one of a file that is no table.

    Raises:
        UserError: the file is no YAML, or none of a recipe.
    """
    try:
        content = parse_yaml(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not readable YAML: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a recipe: expected a mapping with data, tokenizer, train, ...")
    if "variants" not in content:
        return {"": content}
    shared = {key: value for key, value in content.items() if key != "variants"}
    variants = content["variants"]
    if not variants or not isinstance(variants, dict) or not all(isinstance(each, dict) for each in variants.values()):
        raise UserError(f"{path} is not a table of recipes: variants should map names to what they change")
    return {str(name): {"name": str(name), **merged(shared, each)} for name, each in variants.items()}


def merged(old: Any, changes: Any) -> Any:
    """Plain data with changes: mappings key by key, unless they are components of different names."""
    if not isinstance(old, dict) or not isinstance(changes, dict):
        return changes
    if changes.get("name", old.get("name")) != old.get("name"):
        return changes
    return {**old, **{key: merged(old.get(key), value) for key, value in changes.items()}}


def composed(content: Data) -> Data:
    """Plain data of a recipe with its `parts` in their place; one without is returned as it is.

    Seed, data and tokenizer are those of the recipe `parts.tokenizer`. The generator, and how tokens are made and
    drawn, are those of `parts.generator`, whose own tokenizer is left out.

    Raises:
        UserError: no such recipes, or recipes that do not train that part.
    """
    if "parts" not in content:
        return content
    parts = content["parts"]
    if not isinstance(parts, dict) or parts.keys() != {"tokenizer", "generator"}:
        raise UserError(f"parts: expected the names of two recipes, {{tokenizer: ..., generator: ...}}, not {parts!r}")
    found = {model: _part(str(name), model) for model, name in parts.items()}
    whole: Data = {"train": {model: part["train"][model] for model, part in found.items()}}
    for model, keys in PART_KEYS.items():
        whole |= {key: found[model][key] for key in keys if key in found[model]}
    whole["source"] = "; ".join(dict.fromkeys(part["source"] for part in found.values() if "source" in part))
    own = {key: value for key, value in content.items() if key not in ("name", "parts")}
    return {"name": content.get("name"), **merged(whole, own)}


def _part(name: str, model: str) -> Data:
    """Plain data of the recipe that a part is taken from."""
    path, key = find_recipe(name)
    content = read_recipes(path)[key]
    if not isinstance(training := content.get("train"), dict) or training.get(model) is None:
        raise UserError(f"parts.{model}: the recipe {name} trains no {model} of its own")
    return content


def published(content: Data) -> Data:
    """Plain data of a recipe with the figures of its checkpoint, unless it has figures of its own.

    Raises:
        UserError: the zoo has no such checkpoint.
    """
    if content.get("checkpoint") is None or content.get("figures") is not None:
        return content
    figures = zoo_model(str(content["checkpoint"])).figures
    return {**content, "figures": {figure.name: figure.value for figure in figures}}


def shipped_recipes() -> dict[str, Path]:
    """The recipes that plugins bring (kind `recipes`: a module whose folder holds their files), with their files.

    Of two that have one name the first is taken, and the other is told in a `PluginWarning`.
    """
    found: dict[str, Path] = {}
    for plugin in registry().names("recipes"):
        for folder in registry().load("recipes", plugin).__path__:
            for path in sorted(Path(folder).glob("*.yaml")):
                for name in (name or path.stem for name in read_recipes(path)):
                    if found.setdefault(name, path) != path:
                        sentence = f"recipe {name!r} of {path} is hidden by the one of {found[name]}"
                        warnings.warn(sentence, PluginWarning, stacklevel=2)
    return found


def _one_of(path: Path, name: str) -> str:
    names = list(read_recipes(path))
    if names == [""]:
        return ""
    if name not in names:
        raise UserError(f"{path} holds several recipes: name one as {path}:NAME, of {', '.join(names)}")
    return name


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=100)
