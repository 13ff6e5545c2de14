"""The command `compare`; what it needs is imported when it runs."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from smalti.core.commands.arguments import Device, Force, interruptible, with_seed
from smalti.core.errors import UserError


def run_compare(
    table: Annotated[
        str, typer.Argument(metavar="TABLE", help="A YAML file with `variants`, or the name of one that is installed.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="PATH=VALUE", help="Options of all variants, by dotted path.")
    ] = None,
    *,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="NAME", help="Compare this variant; may be repeated.", show_default="all"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder; each variant's run folder is in it.", show_default="runs/<table>")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Held-out images, the first of data.validation.")] = 1000,
    seed: Annotated[int | None, typer.Option(help="Of all variants.", show_default="the recipes'")] = None,
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Train the tokenizers of a table of recipes one after the other, and measure them side by side."""
    path = find_table(table)
    names = chosen_variants(path, only or [])
    changes = with_seed(overrides, seed)
    folder = out or Path("runs") / path.stem

    from smalti.core.compare import compare
    from smalti.core.compare_report import write_comparison
    from smalti.core.distributed import chosen_device
    from smalti.core.progress import Reporter

    with interruptible():
        comparison = compare(path, names, changes, folder, images, chosen_device(device), Reporter(), force=force)
    write_comparison(comparison, folder)
    typer.echo(f"table:    {folder / 'comparison.md'}")
    if comparison.failures:
        for name, sentence in comparison.failures.items():
            print(f"smalti: {name} failed: {sentence}", file=sys.stderr)  # noqa: T201
        raise typer.Exit(1)


def find_table(source: str) -> Path:
    """The file of a table of recipes.

    Args:
        source: its path, or its name without `.yaml` where a plugin brings it.

    Raises:
        UserError: no such table, or a recipe that is none.
    """
    from smalti.core.recipe import read_recipes, shipped_recipes

    files = {path.stem: path for path in shipped_recipes().values()}
    path = Path(source) if Path(source).is_file() else files.get(source)
    if path is None:
        tables = [name for name, file in files.items() if "" not in read_recipes(file)]
        raise UserError(f"no table of recipes {source!r}: it is neither a file nor one of {', '.join(sorted(tables))}")
    if "" in read_recipes(path):
        raise UserError(f"{source} has no variants to compare: it is one recipe, a table has several under `variants`")
    return path


def chosen_variants(path: Path, only: Sequence[str]) -> list[str]:
    """The variants of a table, or `only` some of them, in the order of the table.

    Raises:
        UserError: a name that the table does not have.
    """
    from smalti.core.recipe import read_recipes

    names = list(read_recipes(path))
    for name in only:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(names)}"
            raise UserError(f"{path.stem} has no variant {name!r}; {hint}")
    return [name for name in names if name in only] if only else names
