"""Stage `train-tokenizer`: from images to a trained tokenizer."""

from __future__ import annotations

import torch

from smalti.core import distributed
from smalti.core.autoencoder import Autoencoder
from smalti.core.contracts import Tokenizer, check_supports
from smalti.core.data.loader import TrainBatches
from smalti.core.noise import mixed_seed
from smalti.core.stage import Stage
from smalti.core.training.freeze import freeze
from smalti.core.training.loop import micro_batch, train
from smalti.core.training.options import TokenizerTraining
from smalti.core.training.sharding import whole
from smalti.core.training.start import load_start
from smalti.core.training.tasks import TokenizerTask
from smalti.core.training.text import TextFeatures
from smalti.core.training.validator import PICTURES, Validator


class TrainTokenizer(Stage):
    """Trains the recipe's tokenizer; writes `tokenizer/`, and with validation `tokenizer-best/` and `images/`."""

    name = "train-tokenizer"
    sections = ("seed", "data", "tokenizer", "train.tokenizer")
    after = ()
    outputs = ("tokenizer", "tokenizer-best", PICTURES)

    def run(self) -> None:
        """Train, from the last checkpoint if there is one."""
        recipe = self.context.recipe
        options, training = recipe.tokenizer, recipe.train.tokenizer
        assert options is not None, "the pipeline leaves this stage out"
        assert training is not None, "a recipe with a tokenizer trains it"
        torch.manual_seed(mixed_seed(recipe.seed, self.name, "weights"))
        tokenizer = options.build()
        if recipe.generator is not None:
            check_supports(recipe.generator, tokenizer.layout())  # better told now than after the training
        fit(self, tokenizer, training)


def fit(stage: Stage, model: Tokenizer | Autoencoder, options: TokenizerTraining) -> None:
    """Train `model` on the recipe's images, from the stage's last checkpoint if there is one, and save it.

    Args:
        stage: names the checkpoint.
        model: as the recipe describes it.
        options: how.

    Raises:
        UserError: weights, parts, data or losses that cannot be had or do not fit; what `train` raises.
    """
    context, recipe = stage.context, stage.context.recipe
    if options.start is not None and not (context.run.state / f"{stage.name}.pt").exists():
        load_start(model, options.start)
    freeze(model, options.freeze)
    dataset = recipe.data.train.build()
    text = TextFeatures(options.text) if options.text is not None else None
    task = TokenizerTask(model, options, text, dataset.classes)
    if options.validation is not None:
        task.validator = Validator(
            options.validation,
            model,
            recipe.data.validation.build(),
            run=context.run,
            stage=stage.name,
            reporter=context.reporter,
            max_undecodable=recipe.data.max_undecodable,
            text=text,
        )
    batches = TrainBatches(
        dataset,
        model.preprocessing,
        micro_batch(options),
        seed=recipe.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        max_undecodable=recipe.data.max_undecodable,
        warn=context.reporter.say,
        augment=recipe.data.augment,
        workers=recipe.data.workers,
    )
    averaged = train(task, batches, options, stage=stage.name, context=context)
    weights = whole(model.state_dict())
    if distributed.rank() == 0:
        model.save_pretrained(context.run / model.kind, averaged, weights)
