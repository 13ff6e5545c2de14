"""Stage `train-generator`: from token shards, or from images, to a trained generator."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch

from smalti.core import distributed
from smalti.core.class_names import TRAINED_ON, TrainedOn
from smalti.core.contracts import Tokenizer
from smalti.core.data.encoded_batches import EncodedBatches
from smalti.core.data.loader import TrainBatches
from smalti.core.data.token_batches import TokenBatches
from smalti.core.data.token_shards import read_token_shards
from smalti.core.data.views import Views
from smalti.core.files import write_json
from smalti.core.layout import TokenLayout
from smalti.core.noise import mixed_seed
from smalti.core.stage import Stage
from smalti.core.training.generator_validator import PICTURES, GeneratorValidator
from smalti.core.training.loop import micro_batch, train
from smalti.core.training.options import GeneratorTraining
from smalti.core.training.sharding import whole
from smalti.core.training.task import Batches
from smalti.core.training.tasks import GeneratorTask
from smalti.core.weights import fingerprint


class _Tokens(NamedTuple):
    """What the generator learns from."""

    layout: TokenLayout
    classes: tuple[str, ...]
    batches: Batches


class TrainGenerator(Stage):
    """Trains the recipe's generator; writes `generator/`, and with validation `drawn/`."""

    name = "train-generator"
    sections: ClassVar[tuple[str, ...]] = ("seed", "generator", "train.generator")
    after = ("tokenize",)
    outputs = ("generator", PICTURES)

    def run(self) -> None:
        """Train, from the last checkpoint if there is one."""
        context, recipe, options = self.context, self.context.recipe, self._options
        assert recipe.generator is not None, "the pipeline leaves this stage out"
        tokenizer = Tokenizer.from_pretrained(context.run / "tokenizer")
        made_by = fingerprint(tokenizer, tokenizer.config())
        tokens = self._tokens(tokenizer, made_by)
        torch.manual_seed(mixed_seed(recipe.seed, self.name, "weights"))
        generator = recipe.generator.build(tokens.layout, len(tokens.classes))
        generator.attach(tokenizer)
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
        averaged = train(task, tokens.batches, options, stage=self.name, context=context)
        weights = whole(generator.state_dict())
        if distributed.rank() == 0:
            generator.save_pretrained(context.run / "generator", averaged, weights)
            trained_on = TrainedOn(tokenizer=made_by, classes=tokens.classes)
            write_json(context.run / "generator" / TRAINED_ON, trained_on.model_dump(mode="json"))

    @property
    def _options(self) -> GeneratorTraining:
        options = self.context.recipe.train.generator
        assert options is not None, "the pipeline leaves this stage out"
        return options

    def _tokens(self, tokenizer: Tokenizer, made_by: str) -> _Tokens:
        """Those of the shards, if they are of this tokenizer."""
        del tokenizer
        tokens = read_token_shards(self.context.run / "tokens")
        tokens.check_tokenizer(made_by)
        batches = TokenBatches(
            tokens,
            micro_batch(self._options),
            seed=self.context.recipe.seed,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
        return _Tokens(tokens.layout, tokens.classes, batches)


class TrainGeneratorOnTheFly(TrainGenerator):
    """The same from images, whose tokens the run's tokenizer makes as they are needed."""

    sections = ("seed", "data", "tokenize", "generator", "train.generator")
    after = ("train-tokenizer",)

    def _tokens(self, tokenizer: Tokenizer, made_by: str) -> _Tokens:
        """Those of the training images, each epoch of one view of each."""
        del made_by
        context, recipe = self.context, self.context.recipe
        assert recipe.tokenize is not None, "the pipeline leaves this stage out"
        dataset = recipe.data.train.build()
        images = TrainBatches(
            dataset,
            tokenizer.preprocessing,
            micro_batch(self._options),
            seed=recipe.seed,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            max_undecodable=recipe.data.max_undecodable,
            warn=context.reporter.say,
            augment=Views(recipe.tokenize.flip, recipe.tokenize.ten_crops),
            workers=recipe.data.workers,
        )
        batches = EncodedBatches(images, tokenizer.to(context.device), recipe.tokenize.batch_size)
        return _Tokens(tokenizer.layout(), dataset.classes, batches)
