"""The command `probe`; what it needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smalti.core.commands.arguments import Device, Overrides
from smalti.core.errors import UserError


def run_probe(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="Whose data to probe with: a name, a YAML file, or a run folder.")
    ],
    overrides: Overrides = None,
    *,
    out: Annotated[Path, typer.Option(help="The folder for latents and the result.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="A folder, a name of the zoo, or a hub repository.", show_default="the run folder's"),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 10,
    learning_rate: Annotated[float, typer.Option(min=0, help="Of the linear layer.")] = 1e-4,
    batch_size: Annotated[int, typer.Option(min=1, help="Latents of one update, and images encoded at once.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Of weights and order.")] = 0,
    ema: Annotated[bool, typer.Option("--ema/--no-ema", help="Averaged weights, where there are any.")] = True,
    device: Device = "auto",
) -> None:
    """Train a linear layer on a frozen tokenizer's latents, and tell its top-1 and top-5 accuracy."""
    from pydantic import ValidationError

    from smalti.core.options import sentences
    from smalti.core.recipe import load_recipe

    data = load_recipe(recipe, overrides or []).data
    if tokenizer is None:
        if not (Path(recipe) / "tokenizer").is_dir():
            raise UserError(f"probe: {recipe} is not a run folder with a tokenizer: give one with --tokenizer")
        tokenizer = str(Path(recipe) / "tokenizer")

    from smalti.core.contracts import Tokenizer
    from smalti.core.distributed import chosen_device
    from smalti.core.files import disk_errors
    from smalti.core.probe import ProbeSettings, probe
    from smalti.core.progress import Reporter

    try:
        settings = ProbeSettings(epochs=epochs, learning_rate=learning_rate, batch_size=batch_size, seed=seed)
    except ValidationError as error:
        raise UserError(f"probe: {sentences(error)}") from None
    model = Tokenizer.from_pretrained(tokenizer, ema=ema).to(chosen_device(device))
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    result = probe(model, data, out, settings, Reporter())
    typer.echo(f"top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%}\nresult: {out / 'probe.json'}")
