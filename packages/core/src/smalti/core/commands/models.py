"""The commands `zoo`, `import`, `export` and `reconstruct`; what they need is imported when one runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smalti.core.commands.arguments import Device
from smalti.core.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from smalti.core.checkpoints.zoo import ZooModel

Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="An option that the file cannot tell, by dotted path."),
]
Averaged = Annotated[bool, typer.Option("--ema/--no-ema", help="Averaged weights, where the file holds both.")]


def add_model_commands(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command("zoo")(show_zoo)
    app.command("import")(import_model)
    app.command("export")(export_model)
    app.command("reconstruct")(reconstruct)


def show_zoo(
    name: Annotated[str | None, typer.Argument(help="One model, for all that is known of it.")] = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """List published models: tokens, size, published figures, and whether they can be imported."""
    from smalti.core.checkpoints.zoo import zoo, zoo_model

    models = [zoo_model(name)] if name else [*zoo().values()]
    if as_json:
        content = [model.model_dump(mode="json") | {"url": model.url, "status": model.status} for model in models]
        typer.echo(json.dumps(content[0] if name else content, indent=2))
    elif name:
        typer.echo("\n".join(_facts(models[0])))
    elif sys.stdout.isatty():
        _print_table(models)
    else:
        for model in models:
            typer.echo("  ".join(_row(model)))


def _row(model: ZooModel) -> tuple[str, ...]:
    first = next((f"{figure.name} {figure.value:g}" for figure in model.figures if "FID" in figure.name), "")
    return (model.name, model.system, model.kind, _tokens(model), _millions(model), first, model.status)


def _print_table(models: list[ZooModel]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("name", "system", "kind", "tokens", "parameters", "published", "status"):
        table.add_column(title, overflow="fold", no_wrap=title in ("name", "tokens", "parameters"))
    for model in models:
        table.add_row(*_row(model))
    Console().print(table)


def _tokens(model: ZooModel) -> str:
    """Shape and codebook sizes, e.g. `grid 16x16, 2 x 4096`."""
    if model.tokens is None:
        return f"{model.latents[0]} latents of {model.latents[1]} numbers" if model.latents else ""
    layout, last = model.tokens, "x".join(map(str, model.tokens.shape[-1]))
    shape = f"{len(layout.shape)} to {last}" if layout.kind == "scales" else last
    equal = layout.streams > 1 and len(set(layout.vocab)) == 1
    sizes = f"{layout.streams} x {layout.vocab[0]}" if equal else " + ".join(map(str, layout.vocab))
    return f"{layout.kind} {shape}, {sizes}"


def _millions(model: ZooModel) -> str:
    return f"{model.parameters / 1e6:.4g} M" if model.parameters else ""


def _facts(model: ZooModel) -> list[str]:
    """All that is known, line by line, and how to get it."""
    facts = {
        "name": model.name,
        "system": model.system,
        "kind": model.kind,
        "page": model.home,
        "paper": f"arXiv {model.paper}" if model.paper else None,
        "hub": model.hub,
        "file": model.file,
        "layout": model.layout,
        "licence": f"code {model.licence.code}, weights {model.licence.weights}",
        "trained on": model.data,
        "resolution": f"{model.resolution} pixels" if model.resolution else None,
        "tokens": str(model.tokens) if model.tokens else _tokens(model),
        "parameters": _millions(model),
        "tokenizer": model.tokenizer,
        "note": model.note,
        "status": model.status,
    }
    lines = [f"{title:11} {fact}" for title, fact in facts.items() if fact]
    lines += [f"{'figure':11} {figure.name} {figure.value:g}: {figure.protocol}" for figure in model.figures]
    if model.published is False:
        return lines
    if not model.readable:
        return [*lines, f"{'import':11} not possible: nothing that is installed reads this layout"]
    where = f"smalti import {model.name} --out {model.name}" if model.url else model.command
    return [*lines, *([f"{'download':11} {model.url}"] if model.url else []), f"{'import':11} {where}"]


def import_model(
    source: Annotated[
        str, typer.Argument(metavar="FILE|FOLDER|NAME", help="A published file or folder, or a name of the zoo.")
    ],
    out: Annotated[Path, typer.Option(help="The new folder, with config.json and model.safetensors.")],
    layout: Annotated[
        str | None, typer.Option("--as", help="Layout of the file.", show_default="recognised from names and shapes")
    ] = None,
    changes: Changes = None,
    *,
    ema: Averaged = True,
) -> None:
    """Turn a published checkpoint into a folder that `from_pretrained` takes."""
    from smalti.core.files import atomic_folder

    path, overrides = Path(source), changes or []
    with atomic_folder(out) as folder:
        if not path.exists():
            from smalti.core.checkpoints.zoo import fetch

            model = _named(source)
            path, layout, overrides = fetch(model), layout or model.layout, [*model.overrides, *overrides]
        from smalti.core.checkpoints.importing import import_recognised
        from smalti.core.weights import Pretrained

        module, recognised = import_recognised(path, layout, overrides, ema=ema)
        assert isinstance(module, Pretrained)
        module.save_pretrained(folder)
    typer.echo("\n".join(_described(module, recognised)))
    typer.echo(f"written     {out}")


def _named(source: str) -> ZooModel:
    from smalti.core.checkpoints.zoo import zoo_model

    try:
        return zoo_model(source)
    except UserError as error:
        raise UserError(f"{source} does not exist, and there is {error}") from None


def _described(module: nn.Module, layout: str) -> list[str]:
    from smalti.core.contracts import Generator, Tokenizer
    from smalti.core.weights import Pretrained

    assert isinstance(module, Pretrained)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    lines = [f"layout      {layout}", f"kind        {module.kind}"]
    if isinstance(module, Tokenizer):
        lines.append(f"tokens      {module.layout()}")
    elif isinstance(module, Generator):
        lines.append(f"tokens      {module.token_layout}")
    return [*lines, f"parameters  {parameters / 1e6:.4g} M"]


def export_model(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `smalti import` or `smalti train` wrote.")],
    layout: Annotated[str, typer.Option("--as", help="Layout to write, as in `smalti plugins`, kind checkpoint.")],
    out: Annotated[Path, typer.Option(help="The file: .safetensors, or .pt, .pth, .bin, .ckpt of torch.save.")],
    *,
    ema: Averaged = True,
) -> None:
    """Write a saved model as a file in the layout of its publisher."""
    from smalti.core.checkpoints.importing import export_file, module_class
    from smalti.core.files import read_json
    from smalti.core.weights import CONFIG

    config = read_json(folder / CONFIG, "the configuration of a saved model")
    kind = config.get("kind") if isinstance(config, dict) else None
    module = module_class(kind).from_pretrained(folder, ema=ema)
    entries = export_file(module, layout, out)
    typer.echo(f"{entries} entries written to {out}")


def reconstruct(
    inputs: Annotated[list[str], typer.Argument(metavar="INPUT", help="Image files, folders of them, or tar shards.")],
    tokenizer: Annotated[str, typer.Option(help="A folder, a name of the zoo, or a hub repository.")],
    out: Annotated[Path, typer.Option(help="The new folder.")],
    size: Annotated[str, typer.Option(help="Side in pixels, or original.", show_default="the tokenizer's own")] = "",
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 8,
    draw: Annotated[
        str | None, typer.Option(metavar="NAME", help="Also show what tokens stand for, e.g. gaussians.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Write images beside their reconstructions, with tokens and metrics."""
    from smalti.core.files import atomic_folder
    from smalti.core.reconstruct import image_size, reconstruct_images

    asked = image_size(size)
    with atomic_folder(out) as folder:
        from smalti.core.contracts import Tokenizer
        from smalti.core.distributed import chosen_device

        model = Tokenizer.from_pretrained(tokenizer).to(chosen_device(device))
        summary = reconstruct_images(model, inputs, folder, asked, batch_size, draw)
    figures = "".join(f", {name} {value:.4g}" for name, value in summary.means.items())
    typer.echo(f"{summary.images} images{figures}\npictures: {out / 'grid.png'}")
