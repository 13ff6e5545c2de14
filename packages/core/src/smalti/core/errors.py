"""The error that a user can mend."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(ValueError):
    """A mistake of the user's, told in one sentence: what, where, and what would be right.

    The command line prints the sentence and ends with exit code 2; everything else that escapes is a
    defect of smalti or of a plugin and keeps its traceback.
    """


def few(names: Sequence[str], most: int = 3, between: str = ", ") -> str:
    """The first of many names, for a sentence, and how many more there are."""
    return between.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
