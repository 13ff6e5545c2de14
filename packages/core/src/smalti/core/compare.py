"""The tokenizers of a table of recipes, trained one after the other and measured on the same held-out images.

Legend: B batch, N images shown, H W pixels.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray

from smalti.core.codebook_health import LARGEST_HISTOGRAM, QUEUE, CodebookHealth
from smalti.core.contracts import PairMetric, Tokenizer
from smalti.core.data.images import to_uint8
from smalti.core.data.loader import read_images
from smalti.core.errors import UserError
from smalti.core.metrics import pair_metrics, values_of
from smalti.core.pipeline import Pipeline
from smalti.core.progress import Reporter
from smalti.core.recipe import Recipe, load_recipe
from smalti.core.run_folder import RunFolder
from smalti.core.stage import Context
from smalti.core.step_time import StepTime, step_times

STAGE = "train-tokenizer"
BATCH = 50
SHOWN = 8


@dataclass(frozen=True)
class Measured:
    """What is known of one variant.

    Args:
        recipe: that it was trained by.
        layout: of its tokens, in words.
        bits: of one image, as `TokenLayout.bits`.
        parameters: of the tokenizer.
        images: how many were measured.
        metrics: means over the held-out images by name; None where the images are too small.
        usage: share of each stream's codes that occur.
        perplexity: of each stream's codes.
        originals: uint8 `(N, H, W, 3)`, as the tokenizer saw them.
        copies: their reconstructions.
    """

    recipe: Recipe
    layout: str
    bits: float
    parameters: int
    images: int
    metrics: dict[str, float | None]
    usage: list[float]
    perplexity: list[float]
    originals: NDArray[np.uint8]
    copies: NDArray[np.uint8]


@dataclass(frozen=True)
class Comparison:
    """What came of a table.

    Args:
        table: its name.
        overrides: of all variants.
        device: as PyTorch calls it.
        metrics: the definitions of what was measured.
        measured: by variant, in the order of the table.
        times: of an update, by variant.
        failures: a sentence for each variant that could not be trained or measured.
    """

    table: str
    overrides: tuple[str, ...]
    device: str
    metrics: dict[str, PairMetric]
    measured: dict[str, Measured]
    times: dict[str, StepTime]
    failures: dict[str, str]


def compare(
    table: Path,
    names: Sequence[str],
    overrides: Sequence[str],
    folder: Path,
    images: int,
    device: str,
    reporter: Reporter,
    *,
    force: bool = False,
) -> Comparison:
    """Train, measure and time variants; a training that is done and unchanged is not repeated.

    A variant that fails leaves the others as they are.

    Args:
        table: the file with the recipes.
        names: of the variants, at least one.
        overrides: of all of them.
        folder: a run folder per variant is in it, called as the variant.
        images: so many, the first of the recipes' `data.validation`.
        device: to train and to measure on.
        reporter: told how far the work is, and what failed.
        force: redo what depends on a changed recipe.

    Raises:
        UserError: no variant is a recipe, a run folder holds another recipe's run, or several processes were started.
        KeyboardInterrupt: after Ctrl-C; the same call goes on.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("compare works in one process: start it without torchrun")
    attempts = _Attempts(reporter)
    recipes: dict[str, Recipe] = {}
    for name in names:
        with attempts.of(name):
            recipe = load_recipe(f"{table}:{name}", overrides)
            if recipe.train.tokenizer is None:
                raise UserError(f"recipe {name} trains no tokenizer, and nothing else is compared")
            recipes[name] = recipe
    if not recipes:
        raise UserError(attempts.failures[names[0]])
    contexts = {name: Context(RunFolder(folder / name), recipe, device, reporter) for name, recipe in recipes.items()}
    for context in contexts.values():
        with context.run.locked():
            context.run.prepare(context.recipe, force=force)
    metrics = pair_metrics()
    measured: dict[str, Measured] = {}
    for place, (name, context) in enumerate(contexts.items(), 1):
        reporter.say(f"{name} ({place} of {len(contexts)})")
        with attempts.of(name):
            with context.run.locked():
                Pipeline(context).run([STAGE])
            measured[name] = _measured(context, metrics, images)
    times: dict[str, StepTime] = {}
    if measured:
        reporter.say("time of an update")
        times = step_times({name: recipes[name] for name in measured}, device)
    return Comparison(table.stem, tuple(overrides), device, metrics, measured, times, attempts.failures)


class _Attempts:
    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.failures: dict[str, str] = {}

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Work for one variant, whose failure is kept and told."""
        try:
            yield
        except UserError as error:
            self.failures[name] = str(error)
        # The parts of a variant may be anybody's: whatever one raises must not end the others.
        except Exception as error:  # noqa: BLE001
            self.reporter.say(traceback.format_exc())
            self.failures[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        else:
            return
        self.reporter.say(f"{name} failed: {self.failures[name]}")


@torch.inference_mode()
def _measured(context: Context, metrics: Mapping[str, PairMetric], count: int) -> Measured:
    """The trained tokenizer, with averaged weights where there are any, on held-out images."""
    recipe = context.recipe
    tokenizer = Tokenizer.from_pretrained(context.run / "tokenizer").to(context.device)
    layout, channels = tokenizer.layout(), tokenizer.preprocessing.channels
    codebooks = layout.vocab[: tokenizer.codebooks]
    health = CodebookHealth(codebooks, None if max(codebooks) <= LARGEST_HISTOGRAM else QUEUE)
    values: dict[str, list[float] | None] = {name: [] for name in metrics}
    seen = 0
    originals: list[NDArray[np.uint8]] = []
    copies: list[NDArray[np.uint8]] = []
    for batch in read_images(
        recipe.data.validation.build(),
        tokenizer.preprocessing,
        BATCH,
        0,
        count,
        max_undecodable=recipe.data.max_undecodable,
        warn=context.reporter.say,
        workers=recipe.data.workers,
    ):
        images = batch.images.to(context.device)
        seen += len(images)
        tokens = tokenizer.encode(images)
        health.update(tokens[..., : tokenizer.codebooks])
        pair = [to_uint8(pixels).cpu() for pixels in (images, tokenizer.decode(tokens))]
        planes = [pixels[..., :channels].movedim(-1, 1) for pixels in pair]
        for name, metric in metrics.items():
            known, more = values[name], values_of(metric, planes[1], planes[0])
            values[name] = None if known is None or more is None else known + more
        if len(originals) < SHOWN:
            originals += [*pair[0].numpy()]
            copies += [*pair[1].numpy()]
    if not seen:
        raise UserError(f"there is no image in {recipe.data.validation.name}, the recipe's data.validation")
    figures = health.result()
    return Measured(
        recipe=recipe,
        layout=str(layout),
        bits=layout.bits,
        parameters=sum(parameter.numel() for parameter in tokenizer.parameters()),
        images=seen,
        metrics={name: fmean(numbers) if numbers else None for name, numbers in values.items()},
        usage=figures["usage"],
        perplexity=figures["perplexity"],
        originals=np.stack(originals[:SHOWN]),
        copies=np.stack(copies[:SHOWN]),
    )
