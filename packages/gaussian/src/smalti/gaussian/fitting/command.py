"""The command `fit`; what it needs is imported when it runs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from smalti.core.commands.arguments import Device, interruptible
from smalti.core.errors import UserError


def fit(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="An image file.")],
    gaussians: Annotated[int, typer.Option(min=1, help="How many; at most one per pixel.")],
    out: Annotated[Path, typer.Option(help="The folder; the same command goes on with an interrupted fit there.")],
    *,
    steps: Annotated[int, typer.Option(min=0, help="Updates of all Gaussians.")] = 2000,
    size: Annotated[
        int | None, typer.Option(min=1, help="Resize the longer side to this many pixels.", show_default="as it is")
    ] = None,
    scale: Annotated[
        float, typer.Option(min=0.01, max=64, help="Enlarge what is drawn; the Gaussians stay the same.")
    ] = 1.0,
    bits: Annotated[
        str,
        typer.Option(
            metavar="MEANS,SCALES,ROTATIONS,COLOURS",
            help="Also store the Gaussians with so many bits for a number of each kind, e.g. 12,7,7,7.",
        ),
    ] = "",
    tuning_steps: Annotated[int, typer.Option(min=0, help="Updates with rounded numbers, with --bits.")] = 200,
    gif: Annotated[bool, typer.Option("--gif", help="Keep an animation of the fit.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of where the Gaussians begin.")] = 0,
    device: Device = "auto",
) -> None:
    """Fit one picture with 2-D Gaussians; write them, the rendering, their ellipses and the PSNR."""
    if find_spec("PIL") is None:
        raise UserError("fit: reading images needs the extra smalti-gaussian[fit], which is not installed")

    from smalti.core.distributed import chosen_device
    from smalti.core.progress import Reporter
    from smalti.gaussian.fitting.fit import FitOptions
    from smalti.gaussian.fitting.folder import FitFolder, Wanted
    from smalti.gaussian.fitting.input import read_image
    from smalti.gaussian.fitting.quantized import parsed_bits

    wanted = Wanted(scale, parsed_bits(bits) if bits else None, tuning_steps, gif)
    pixels = read_image(image, size).to(chosen_device(device))
    folder = FitFolder(out, pixels, FitOptions(gaussians=gaussians, steps=steps, seed=seed), wanted, Reporter())
    with interruptible():
        for line in folder.run():
            typer.echo(line)
