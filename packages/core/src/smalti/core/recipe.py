"""Recipes: one YAML file that says everything a run does."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from smalti.core.errors import UserError
from smalti.core.options import (
    DatasetOptions,
    GeneratorOptions,
    Options,
    Slot,
    StageOptions,
    TokenizerOptions,
    sentences,
)
from smalti.core.overrides import apply_override
from smalti.core.plugins import registry
from smalti.core.sampling_settings import SamplingSettings
from smalti.core.training.options import GeneratorTraining, TokenizerTraining

Data = dict[str, Any]


class DataSection(Options):
    """The images: those that models are fitted to, and held-out ones that they are judged by.

    Args:
        train: for training.
        validation: for judging.
        max_undecodable: images that may be damaged, by pass over the data, before a stage gives up.
    """

    train: Annotated[DatasetOptions, Slot("dataset")]
    validation: Annotated[DatasetOptions, Slot("dataset")]
    max_undecodable: Annotated[int, Field(ge=0)] = 100


class TrainSection(Options):
    """How the two models are trained."""

    tokenizer: TokenizerTraining
    generator: GeneratorTraining


class TokenizeSection(Options):
    """How images become token shards.

    Args:
        batch_size: images encoded at once.
        shard_size: samples of one tar file.
        flip: add the tokens of every image's mirror image as a second view.
    """

    batch_size: Annotated[int, Field(ge=1)] = 64
    shard_size: Annotated[int, Field(ge=1)] = 10_000
    flip: bool = False


class SampleSection(SamplingSettings):
    """How many images are drawn, and how.

    Args:
        count: images; sample i is of class i modulo the number of classes.
        batch_size: images drawn at once.
        grid_columns: images of one class in the PNG grid.
    """

    count: Annotated[int, Field(ge=1)] = 50_000
    batch_size: Annotated[int, Field(ge=1)] = 64
    grid_columns: Annotated[int, Field(ge=1)] = 10


class Recipe(Options):
    """A run from images to evaluated samples.

    Args:
        name: of the recipe.
        summary: one line for `smalti recipes`.
        source: paper or project that it reproduces.
        figures: what the source publishes, by name.
        seed: of everything random in the run.
    """

    name: str
    summary: str
    source: str = ""
    figures: dict[str, float] = Field(default_factory=dict)
    seed: Annotated[int, Field(ge=0)] = 0
    data: DataSection
    tokenizer: Annotated[TokenizerOptions, Slot("tokenizer")]
    generator: Annotated[GeneratorOptions, Slot("generator")]
    train: TrainSection
    tokenize: TokenizeSection = TokenizeSection()
    sample: SampleSection = SampleSection()
    evaluate: Annotated[StageOptions, Slot("stage", "evaluate")] | None = None

    def section(self, path: str) -> Any:
        """The part at a dotted path, as plain data."""
        value: Any = self.model_dump(mode="json")
        for key in path.split("."):
            value = value[key]
        return value


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by name, by path, or out of a run folder, with dotted overrides.

    Args:
        source: a name that `smalti recipes` lists, a YAML file, or a folder with `recipe.yaml`.
        overrides: `tokenizer.quantizer.codebook_size=1024`; values are YAML.

    Raises:
        UserError: nothing of that name; unreadable YAML; a wrong option, with its dotted path.
    """
    path = find_recipe(source)
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a recipe: expected a mapping with data, tokenizer, generator, ...")
    for override in overrides:
        apply_override(content, override)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise UserError(f"recipe {path.stem if path.stem != 'recipe' else path}: {sentences(error)}") from None


def find_recipe(source: str | Path) -> Path:
    """The YAML file of a recipe given by name, path or run folder."""
    path = Path(source)
    if path.is_dir():
        if not (path / "recipe.yaml").exists():
            raise UserError(f"{path} is not a run folder: it has no recipe.yaml")
        return path / "recipe.yaml"
    if path.is_file():
        return path
    named = {found.stem: found for found in shipped_recipes()}
    if str(source) in named:
        return named[str(source)]
    close = difflib.get_close_matches(str(source), named, n=1)
    raise UserError(
        f"no recipe {str(source)!r}: it is neither a file nor one of {', '.join(sorted(named)) or '(none)'}"
        + (f"; did you mean {close[0]!r}?" if close else "")
    )


def shipped_recipes() -> Iterator[Path]:
    """The YAML files that plugins bring (kind `recipes`: a module whose folder holds them)."""
    for name in registry().names("recipes"):
        module = registry().load("recipes", name)
        for folder in module.__path__:
            yield from sorted(Path(folder).glob("*.yaml"))


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=100)
