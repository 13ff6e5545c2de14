"""A tokenizer that was trained elsewhere, in the place of one that a recipe trains; imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from smalti.core.errors import UserError
from smalti.core.options import TokenizerOptions

if TYPE_CHECKING:
    from smalti.core.contracts import Tokenizer


class PublishedTokenizerOptions(TokenizerOptions):
    """Options of a tokenizer as it is, with its weights. What is built tells its own options, not these.

    Args:
        source: a name of the zoo, a run or a saved tokenizer (folder), or a hub name `owner/repository`.
        preprocessing: in the place of the tokenizer's own, perhaps of another size where it takes several.
    """

    name: Literal["published"] = "published"
    source: str

    def build(self) -> Tokenizer:
        """Load it, averaged weights where there are any.

        Raises:
            UserError: nothing usable there, or channels or a size of images that it cannot take.
        """
        from smalti.core.contracts import Tokenizer
        from smalti.core.weights import CONFIG

        of_run = Path(self.source) / "tokenizer"
        tokenizer = Tokenizer.from_pretrained(of_run if (of_run / CONFIG).is_file() else self.source)
        own, asked = tokenizer.preprocessing.channels, self.preprocessing.channels
        if own != asked:
            raise UserError(f"{self.source} takes images of {own} channels, not {asked}: set preprocessing.channels")
        tokenizer.options = tokenizer.options.model_copy(update={"preprocessing": self.preprocessing})
        tokenizer.layout()  # raises where it cannot take that size
        return tokenizer
