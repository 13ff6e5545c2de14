"""Stage `train-tokenizer`: from images to a trained tokenizer."""

from __future__ import annotations

import torch

from smalti.core import distributed
from smalti.core.contracts import check_supports
from smalti.core.data.loader import TrainBatches
from smalti.core.noise import mixed_seed
from smalti.core.stage import Stage
from smalti.core.training.loop import micro_batch, train
from smalti.core.training.start import load_start
from smalti.core.training.tasks import TokenizerTask
from smalti.core.training.validator import BEST, PICTURES, Validator


class TrainTokenizer(Stage):
    """Trains the recipe's tokenizer; writes `tokenizer/`, and with validation `tokenizer-best/` and `images/`."""

    name = "train-tokenizer"
    sections = ("seed", "data", "tokenizer", "train.tokenizer")
    after = ()
    outputs = ("tokenizer", BEST, PICTURES)

    def run(self) -> None:
        """Train, from the last checkpoint if there is one."""
        context, recipe = self.context, self.context.recipe
        options = recipe.train.tokenizer
        torch.manual_seed(mixed_seed(recipe.seed, self.name, "weights"))
        tokenizer = recipe.tokenizer.build()
        if recipe.generator is not None:
            check_supports(recipe.generator, tokenizer.layout())  # better told now than after the training
        if options.start is not None and not (context.run.state / f"{self.name}.pt").exists():
            load_start(tokenizer, options.start)
        task = TokenizerTask(tokenizer, options)
        if options.validation is not None:
            task.validator = Validator(
                options.validation,
                tokenizer,
                recipe.data.validation.build(),
                run=context.run,
                stage=self.name,
                reporter=context.reporter,
                max_undecodable=recipe.data.max_undecodable,
            )
        batches = TrainBatches(
            recipe.data.train.build(),
            tokenizer.preprocessing,
            micro_batch(options),
            seed=recipe.seed,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            max_undecodable=recipe.data.max_undecodable,
            warn=context.reporter.say,
            augment=recipe.data.augment,
            workers=recipe.data.workers,
        )
        averaged = train(task, batches, options, stage=self.name, context=context)
        if distributed.rank() == 0:
            tokenizer.save_pretrained(context.run / "tokenizer", averaged)
