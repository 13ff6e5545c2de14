"""Stage `train-tokenizer` of recipes whose tokenizer was trained elsewhere."""

from __future__ import annotations

from smalti.core import distributed
from smalti.core.contracts import check_supports
from smalti.core.stage import Stage


class TakeTokenizer(Stage):
    """Fetches the recipe's published tokenizer; writes `tokenizer/`, as if it had been trained."""

    name = "train-tokenizer"
    sections = ("data", "tokenizer")
    after = ()
    outputs = ("tokenizer",)

    def run(self) -> None:
        """Load it, and save it with the weights that it is used with."""
        recipe = self.context.recipe
        assert recipe.tokenizer is not None, "the pipeline leaves this stage out"
        if distributed.rank() == 0:
            tokenizer = recipe.tokenizer.build()
            if recipe.generator is not None:
                check_supports(recipe.generator, tokenizer.layout())
            tokenizer.save_pretrained(self.context.run / "tokenizer")
