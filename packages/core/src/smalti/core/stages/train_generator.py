"""Stage `train-generator`: from token shards to a trained generator."""

from __future__ import annotations

import torch

from smalti.core import distributed
from smalti.core.contracts import Tokenizer
from smalti.core.data.token_batches import TokenBatches
from smalti.core.data.token_shards import read_token_shards
from smalti.core.files import write_json
from smalti.core.noise import mixed_seed
from smalti.core.stage import Stage
from smalti.core.training.generator_validator import PICTURES, GeneratorValidator
from smalti.core.training.loop import micro_batch, train
from smalti.core.training.sharding import whole
from smalti.core.training.tasks import GeneratorTask
from smalti.core.weights import fingerprint


class TrainGenerator(Stage):
    """Trains the recipe's generator; writes `generator/`, and with validation `drawn/`."""

    name = "train-generator"
    sections = ("seed", "generator", "train.generator")
    after = ("tokenize",)
    outputs = ("generator", PICTURES)

    def run(self) -> None:
        """Train, from the last checkpoint if there is one."""
        context, recipe = self.context, self.context.recipe
        options = recipe.train.generator
        assert recipe.generator is not None, "the pipeline leaves this stage out"
        assert options is not None
        tokenizer = Tokenizer.from_pretrained(context.run / "tokenizer")
        tokens = read_token_shards(context.run / "tokens")
        tokens.check_tokenizer(fingerprint(tokenizer, tokenizer.config()))
        torch.manual_seed(mixed_seed(recipe.seed, self.name, "weights"))
        generator = recipe.generator.build(tokens.layout, len(tokens.classes))
        generator.attach(tokenizer)
        batches = TokenBatches(
            tokens,
            micro_batch(options),
            seed=recipe.seed,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
        task = GeneratorTask(generator)
        if options.validation is not None:
            task.validator = GeneratorValidator(
                options.validation,
                generator,
                tokenizer,
                recipe.data.validation.build(),
                run=context.run,
                reporter=context.reporter,
                max_undecodable=recipe.data.max_undecodable,
            )
        averaged = train(task, batches, options, stage=self.name, context=context)
        weights = whole(generator.state_dict())
        if distributed.rank() == 0:
            generator.save_pretrained(context.run / "generator", averaged, weights)
            write_json(context.run / "generator" / "tokenizer.json", {"tokenizer": tokens.tokenizer})
