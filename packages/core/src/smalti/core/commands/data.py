"""The commands `shards make` and `data check`; what they need is imported when one runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from smalti.core.errors import UserError

if TYPE_CHECKING:
    from smalti.core.data.dataset import ImageDataset
    from smalti.core.options import DatasetOptions

Settings = Annotated[
    list[str] | None, typer.Argument(metavar="OPTION=VALUE", help="Options of the data set, e.g. path=photos.")
]
Workers = Annotated[int, typer.Option(min=0, help="Threads.")]


def add_data_commands(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    shards = typer.Typer(help="Turn images into tar shards.", no_args_is_help=True)
    shards.command("make")(make)
    app.add_typer(shards, name="shards")
    data = typer.Typer(help="Look at images before training on them.", no_args_is_help=True)
    data.command("check")(look_through)
    app.add_typer(data, name="data")


def make(
    out: Annotated[Path, typer.Argument(help="The folder for the shards; a run that was killed goes on there.")],
    dataset: Annotated[str, typer.Argument(help="A kind of data set that `smalti plugins` lists, e.g. folder.")],
    options: Settings = None,
    *,
    name: Annotated[str | None, typer.Option(help="Of the data set made.", show_default="the source's")] = None,
    samples: Annotated[int, typer.Option(help="Images of one shard.")] = 1000,
    prefix: Annotated[str, typer.Option(help="Of the shards' names.")] = "train",
    seed: Annotated[int, typer.Option(help="Of the order of images.")] = 0,
    keep_order: Annotated[bool, typer.Option("--keep-order", help="Do not shuffle.")] = False,
    short_side: Annotated[int | None, typer.Option(help="Reduce images whose short side is longer.")] = None,
    encode: Annotated[str, typer.Option(help="keep, jpg or png.")] = "keep",
    quality: Annotated[int, typer.Option(help="Of JPEG, 1 to 100.")] = 95,
    workers: Workers = 2,
    max_undecodable: Annotated[int, typer.Option(min=0, help="Damaged images that may be left out.")] = 0,
) -> None:
    """Write a data set as WebDataset tar shards with a dataset.json, e.g. `shards make out folder path=photos`."""
    from pydantic import ValidationError

    from smalti.core.data.make_shards import ShardSettings, make_shards
    from smalti.core.options import sentences
    from smalti.core.progress import Reporter

    source = _dataset_options(dataset, options)
    try:
        settings = ShardSettings(
            name=name,
            prefix=prefix,
            samples=samples,
            shuffle=None if keep_order else seed,
            short_side=short_side,
            encode=encode,
            quality=quality,
        )
    except ValidationError as error:
        raise UserError(f"shards make: {sentences(error)}") from None
    images, reporter = source.build(), Reporter()
    with reporter.progress("shards", len(images), unit="image") as advance:
        counts = make_shards(
            images,
            out,
            settings,
            source=source.model_dump(mode="json"),
            workers=workers,
            max_undecodable=max_undecodable,
            warn=reporter.say,
            advance=advance,
        )
    typer.echo(f"{sum(counts.values())} images in {len(counts)} shards: {out / f'{prefix}-*.tar'}")


def look_through(
    dataset: Annotated[str, typer.Argument(help="A kind of data set, e.g. folder, or a recipe.")],
    options: Settings = None,
    *,
    workers: Workers = 2,
) -> None:
    """Count and decode all images of a data set, or of a recipe's two, and list what is damaged (exit code 1)."""
    from smalti.core.data.check import check
    from smalti.core.plugins import registry
    from smalti.core.progress import Reporter

    if dataset in registry().names("dataset"):
        sources = [_dataset_options(dataset, options)]
    else:
        from smalti.core.recipe import load_recipe

        data = load_recipe(dataset, options or []).data
        sources = [data.train, *([data.validation] if data.validation != data.train else [])]
    damaged = False
    for source in sources:
        images, reporter = source.build(), Reporter()
        with reporter.progress("check", _length(images), unit="image") as advance:
            findings = check(images, workers, advance)
        typer.echo("\n".join(findings.sentences(images)))
        damaged |= bool(findings.damaged)
    if damaged:
        raise typer.Exit(1)


def _length(images: ImageDataset) -> int | None:
    try:
        return len(images)
    except UserError:  # of damage, which the check tells with all the rest
        return None


def _dataset_options(name: str, settings: list[str] | None) -> DatasetOptions:
    """The options of a data set of one kind, from `option=value`."""
    from pydantic import ValidationError

    from smalti.core.options import sentences
    from smalti.core.overrides import apply_override
    from smalti.core.plugins import registry

    content: dict[str, Any] = {"name": name}
    for setting in settings or []:
        apply_override(content, setting)
    try:
        options: DatasetOptions = registry().options("dataset", name).model_validate(content)
    except ValidationError as error:
        raise UserError(f"data set {name}: {sentences(error)}") from None
    return options
