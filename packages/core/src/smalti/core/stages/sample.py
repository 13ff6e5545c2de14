"""Stage `sample`: from a generator to images."""

from __future__ import annotations

from pathlib import Path

from smalti.core.class_names import read_trained_on
from smalti.core.contracts import Generator, Tokenizer
from smalti.core.errors import UserError
from smalti.core.recipe import Recipe
from smalti.core.sampling.run import SamplingRun, chosen_classes
from smalti.core.stage import Stage
from smalti.core.weights import fingerprint


class Sample(Stage):
    """Draws images of classes in turn; writes `samples/`, see `smalti.core.sampling.run`."""

    name = "sample"
    sections = ("seed", "sample")
    after = ("train-generator",)
    outputs = ("samples",)

    def run(self) -> None:
        """Draw what is missing, then put it together."""
        self.sampling().draw(self.context.reporter)

    def sampling(self) -> SamplingRun:
        """What is to be drawn, with the run's models; raises as `sampling_of`."""
        context = self.context
        return sampling_of(context.run.path, context.recipe, context.device)


def sampling_of(run: Path, recipe: Recipe, device: str) -> SamplingRun:
    """What a run is to draw, with its models.

    Raises:
        UserError: a recipe that draws no samples, a tokenizer that is not the generator's, or classes that there are
            not.
    """
    if recipe.sample is None:
        raise UserError(f"the recipe of {run} has no section sample")
    tokenizer = Tokenizer.from_pretrained(run / "tokenizer").to(device)
    generator = Generator.from_pretrained(run / "generator").to(device)
    trained_on = read_trained_on(run / "generator")
    names = trained_on.classes
    _check_pair(tokenizer, trained_on.tokenizer, run / "generator")
    chosen = chosen_classes(recipe.sample.classes, generator.classes, names)
    return SamplingRun(tokenizer, generator, recipe.sample, chosen, run / "samples", device, recipe.seed, names)


def _check_pair(tokenizer: Tokenizer, trained_with: str, folder: Path) -> None:
    found = fingerprint(tokenizer, tokenizer.config())
    if trained_with != found:
        raise UserError(
            f"the generator in {folder} was trained on tokens of another tokenizer ({trained_with}, this "
            f"one is {found}): run `smalti tokenize` and `smalti train generator` again"
        )
