"""What commands have in common: arguments that mean the same in all of them, and how Ctrl-C is told."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="PATH=VALUE", help="Options of the recipe, by dotted path.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
Force = Annotated[bool, typer.Option("--force", help="Redo what depends on a changed recipe.")]


def with_seed(overrides: list[str] | None, seed: int | None) -> list[str]:
    """Overrides of a recipe, and behind them the one of its seed where `--seed` is given."""
    return [*(overrides or []), *([] if seed is None else [f"seed={seed}"])]


@contextmanager
def interruptible() -> Iterator[None]:
    """End a command at Ctrl-C with one line and exit code 130, where the same command goes on later."""
    try:
        yield
    except KeyboardInterrupt:
        print("smalti: interrupted; the same command goes on from here", file=sys.stderr)  # noqa: T201
        raise typer.Exit(130) from None
