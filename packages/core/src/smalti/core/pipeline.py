"""The pipeline: which stages a recipe has, which of them still have to run, and running them."""

from __future__ import annotations

import time

from smalti.core import distributed
from smalti.core.errors import UserError
from smalti.core.published_tokenizer import PublishedTokenizerOptions
from smalti.core.run_folder import fingerprint
from smalti.core.stage import Context, Stage
from smalti.core.stages.sample import Sample
from smalti.core.stages.take_tokenizer import TakeTokenizer
from smalti.core.stages.tokenize import Tokenize
from smalti.core.stages.train_autoencoder import TrainAutoencoder
from smalti.core.stages.train_generator import TrainGenerator, TrainGeneratorOnTheFly
from smalti.core.stages.train_tokenizer import TrainTokenizer

COMMANDS = {
    "train-tokenizer": "smalti train tokenizer",
    "train-autoencoder": "smalti train autoencoder",
    "tokenize": "smalti tokenize",
    "train-generator": "smalti train generator",
    "sample": "smalti sample",
    "evaluate": "smalti evaluate",
}


class Pipeline:
    """The stages of one run: those whose sections the recipe has."""

    def __init__(self, context: Context) -> None:
        self.context = context
        published = isinstance(context.recipe.tokenizer, PublishedTokenizerOptions)
        tokenize = context.recipe.tokenize
        self.on_the_fly = tokenize is not None and tokenize.on_the_fly
        stages: list[Stage] = [
            TakeTokenizer(context) if published else TrainTokenizer(context),
            TrainAutoencoder(context),
            *([TrainGeneratorOnTheFly(context)] if self.on_the_fly else [Tokenize(context), TrainGenerator(context)]),
            Sample(context),
        ]
        if context.recipe.evaluate is not None:
            stages.append(context.recipe.evaluate.build(context))
        self.stages: dict[str, Stage] = {}
        self.fingerprints: dict[str, str] = {}
        for stage in stages:
            if all(context.recipe.section(path) is not None for path in stage.sections):
                self._add(stage)

    def _add(self, stage: Stage) -> None:
        missing = [name for name in stage.after if name not in self.stages]
        if missing:
            raise UserError(
                f"{stage.name} needs {missing[0]}, for which the recipe has no section; its stages before that are "
                f"{', '.join(self.stages)}"
            )
        self.stages[stage.name] = stage
        self.fingerprints[stage.name] = self._fingerprint(stage)

    def _fingerprint(self, stage: Stage) -> str:
        """Of all that the stage's output depends on: its parts of the recipe, and the stages before it."""
        content = [self.context.recipe.section(path) for path in stage.sections]
        return fingerprint([stage.name, content, [self.fingerprints[name] for name in stage.after]])

    def run(self, names: list[str] | None = None) -> None:
        """Run these stages, or all; those that are done and unchanged are left as they are.

        Raises:
            UserError: a stage is not in the recipe, or one that it needs is not done.
        """
        for name in names or list(self.stages):
            if name == Tokenize.name and self.on_the_fly:
                raise UserError("tokenize.on_the_fly makes no token shards: go on with `smalti train generator`")
            if name not in self.stages:
                raise UserError(f"the recipe has no section for {name!r}; its stages are {', '.join(self.stages)}")
            self._run(self.stages[name])

    def _run(self, stage: Stage) -> None:
        run, reporter = self.context.run, self.context.reporter
        for before in stage.after:
            if not self._done(before):
                raise UserError(f"{stage.name} needs {before} first: run `{COMMANDS[before]} {run.path}`")
        if self._done(stage.name):
            reporter.say(f"{stage.name}: done before")
            return
        known = run.stages().get(stage.name, {})
        distributed.barrier()
        if distributed.rank() == 0:
            if known and known.get("fingerprint") != self.fingerprints[stage.name]:
                run.remove((*stage.outputs, f"state/{stage.name}.pt"))
                run.rewind_metrics(stage.name, 0)
            run.record(stage.name, fingerprint=self.fingerprints[stage.name], done=False)
        distributed.barrier()
        started = time.monotonic()
        stage.run()
        distributed.barrier()
        if distributed.rank() == 0:
            run.record(stage.name, done=True, seconds=round(time.monotonic() - started, 1))
        distributed.barrier()

    def _done(self, name: str) -> bool:
        known = self.context.run.stages().get(name, {})
        return bool(known.get("done")) and known.get("fingerprint") == self.fingerprints[name]
