"""The error that a user can mend."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(ValueError):
    """A mistake of the user's, told in one sentence: what, where, and what would be right.

    The command line prints the sentence and ends with exit code 2; everything else that escapes is a
    defect of smalti or of a plugin and keeps its traceback.

    What a file says may stand in the sentence: characters that would break its line, or steer a terminal, are escaped.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__("".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in sentence))


def few(names: Sequence[str], most: int = 3, between: str = ", ") -> str:
    """The first of many names, for a sentence, and how many more there are."""
    return between.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
