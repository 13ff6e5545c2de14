"""The commands `evaluate images`, `tokens`, `stats` and `compare`; what they need is imported when one runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smalti.core.commands.arguments import Device
from smalti.core.errors import UserError

if TYPE_CHECKING:
    from smalti.core.progress import Reporter
    from smalti.eval.image_evaluation import Evaluation

MOST_PARTS = 40  # of a figure that are printed; the result has all

Protocol = Annotated[
    str,
    typer.Option(
        help="adm, torch-fidelity, clean, pytorch-fid, rfid-imagenet-val, gaussiantoken, dinov2, classifier or cmmd."
    ),
]
Changes = Annotated[
    list[str] | None,
    typer.Argument(metavar="PATH=VALUE", help="Options of the protocol, e.g. extractor.weights=FILE."),
]
Count = Annotated[int | None, typer.Option(min=1, help="Take only the first images, or draw so many.")]
Out = Annotated[Path, typer.Option(help="The folder for results and report.")]
BatchSize = Annotated[
    int, typer.Option(min=1, help="Images taken at once; features may differ by the network's rounding.")
]


def images(
    images: Annotated[
        str,
        typer.Argument(
            metavar="IMAGES",
            help="A folder, tar shards, an .npz file, tokenizer:NAME for reconstructions, generator:RUN for samples.",
        ),
    ],
    reference: Annotated[
        str, typer.Argument(metavar="REFERENCE", help="A folder, tar shards, or an .npz file of images or statistics.")
    ],
    changes: Changes = None,
    *,
    protocol: Protocol = "torch-fidelity",
    metrics: Annotated[
        str, typer.Option(metavar="NAME,...", help="What to measure.", show_default="the protocol's")
    ] = "",
    out: Out = Path("evaluation"),
    count: Count = None,
    batch_size: BatchSize = 32,
    bootstrap: Annotated[
        int, typer.Option(min=0, metavar="REPEATS", help="Resamplings for 95 % intervals, each as long as its figure.")
    ] = 0,
    device: Device = "auto",
) -> None:
    """Measure images against others: FID, precision and recall, PSNR and more, with a report."""
    from smalti.eval.evaluation_sides import Asked
    from smalti.eval.image_evaluation import evaluate_images
    from smalti.eval.protocols import protocol as named

    if bootstrap == 1:
        raise UserError("evaluate images: an interval needs 2 resamplings or more, got --bootstrap 1")
    with _processes(device) as (found, first, reporter):
        names = [name.strip() for name in metrics.split(",") if name.strip()]
        asked = Asked(images, reference, named(protocol, changes or []), names, count, batch_size, bootstrap, found)
        evaluation = evaluate_images(asked, reporter)
        if first:
            _tell(evaluation, out, reporter)


def tokens(
    tokens: Annotated[
        str,
        typer.Argument(
            metavar="TOKENS", help="A run folder, a folder of token shards, or tokenizer:NAME to encode images."
        ),
    ],
    images: Annotated[
        str | None, typer.Argument(metavar="[IMAGES]", help="What tokenizer:NAME encodes, as for `evaluate images`.")
    ] = None,
    *,
    side_bits: Annotated[
        float, typer.Option(min=0, help="Bits of an image that its decoder needs beside the tokens.")
    ] = 0.0,
    out: Out = Path("evaluation"),
    count: Count = None,
    batch_size: BatchSize = 32,
    device: Device = "auto",
) -> None:
    """Measure how codes are used, by stream and scale, and the bits of an image, with a report."""
    from smalti.eval.token_evaluation import AskedOfTokens, evaluate_tokens

    with _processes(device) as (found, first, reporter):
        asked = AskedOfTokens(tokens, images, side_bits, count, batch_size, found)
        evaluation = evaluate_tokens(asked, reporter)
        if first:
            _tell(evaluation, out, reporter)


def stats(
    images: Annotated[str, typer.Argument(metavar="IMAGES", help="A folder, tar shards, or an .npz file of images.")],
    changes: Changes = None,
    *,
    protocol: Protocol = "torch-fidelity",
    out: Annotated[Path, typer.Option(help="The folder for the file, which gets a name of its own.")] = Path(),
    count: Count = None,
    batch_size: BatchSize = 32,
    device: Device = "auto",
) -> None:
    """Write the statistics of a reference, so that its images are needed no more."""
    from smalti.eval.protocols import protocol as named
    from smalti.eval.statistics_of_images import statistics_of_images

    with _processes(device) as (found, first, reporter):
        settings = named(protocol, changes or [])
        path = statistics_of_images(images, settings, out, count, batch_size, found, reporter)
        if first:
            typer.echo(f"statistics: {path}")


def compare(
    first: Annotated[Path, typer.Argument(metavar="A.json", help="A result of `smalti evaluate images`.")],
    second: Annotated[Path, typer.Argument(metavar="B.json", help="Another one.")],
) -> None:
    """Set two results side by side, or tell why they are not comparable."""
    from smalti.eval.comparison import compared

    rows = compared(first, second)
    if not rows:
        raise UserError(f"{first} and {second} have no figure in common")
    typer.echo(f"{'':20} {'A':>12} {'B':>12} {'B - A':>12}")
    for row in rows:
        values = f"{row.first:12.6g} {row.second:12.6g} {row.second - row.first:+12.4g}"
        typer.echo(f"{row.title:20} {values}  {row.better} is better")


def _tell(evaluation: Evaluation, out: Path, reporter: Reporter) -> None:
    """Write results and report, and print the figures."""
    from smalti.eval.image_report import write_evaluation

    write_evaluation(out, evaluation)
    for warning in evaluation.warnings:
        reporter.say(f"warning: {warning}")
    for figure in evaluation.figures:
        typer.echo(f"{figure.title:20} {figure.exact()}")
        if len(figure.parts) <= MOST_PARTS:
            for name, value in figure.parts.items():
                typer.echo(f"  {name:18} {value:.6g}")
    typer.echo(f"result: {out / 'results.json'}\nreport: {out / 'report.html'}")


@contextmanager
def _processes(device: str) -> Iterator[tuple[str, bool, Reporter]]:
    """The device of this process, whether it is the first one, and whom to tell; `torchrun` may have started others."""
    from smalti.core import distributed
    from smalti.core.progress import Reporter

    with distributed.joined(device) as name:
        first = distributed.rank() == 0
        yield name, first, Reporter(quiet=not first)
