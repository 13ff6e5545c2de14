"""Importing this leaves a trace, which a reader of strange files must never do."""

from pathlib import Path

Path("imported").touch()


class Innocent:
    """What a pickle asks for."""
