"""Stage `sample`: from a generator to images."""

from __future__ import annotations

from smalti.core.contracts import Generator, Tokenizer
from smalti.core.data.token_shards import MANIFEST
from smalti.core.errors import UserError
from smalti.core.files import read_json
from smalti.core.sampling_run import SamplingRun, chosen_classes
from smalti.core.stage import Stage
from smalti.core.weights import fingerprint


class Sample(Stage):
    """Draws images of classes in turn; writes `samples/`, see `smalti.core.sampling_run`."""

    name = "sample"
    sections = ("seed", "sample")
    after = ("train-generator",)
    outputs = ("samples",)

    def run(self) -> None:
        """Draw what is missing, then put it together."""
        self.sampling().draw(self.context.reporter)

    def sampling(self) -> SamplingRun:
        """What is to be drawn, with the run's models.

        Raises:
            UserError: a tokenizer that is not the generator's; classes that there are not.
        """
        context = self.context
        options = context.recipe.sample
        assert options is not None, "the pipeline leaves this stage out"
        tokenizer = Tokenizer.from_pretrained(context.run / "tokenizer").to(context.device)
        generator = Generator.from_pretrained(context.run / "generator").to(context.device)
        self._check_pair(tokenizer)
        names = tuple(read_json(context.run / "tokens" / MANIFEST, "the layout of token shards")["classes"])
        return SamplingRun(
            tokenizer,
            generator,
            options,
            chosen_classes(options.classes, generator.classes, names),
            context.run / "samples",
            context.device,
            context.recipe.seed,
            names,
        )

    def _check_pair(self, tokenizer: Tokenizer) -> None:
        path = self.context.run / "generator" / "tokenizer.json"
        trained_with = read_json(path, "the tokenizer's fingerprint")["tokenizer"]
        found = fingerprint(tokenizer, tokenizer.config())
        if trained_with != found:
            raise UserError(
                f"the generator in {path.parent} was trained on tokens of another tokenizer ({trained_with}, this "
                f"one is {found}): run `smalti tokenize` and `smalti train generator` again"
            )
