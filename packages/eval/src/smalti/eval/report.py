"""The report of a run: one HTML file that needs nothing else.

Legend: H W pixels.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from string import Template
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from smalti.core.data.images import png_bytes
from smalti.eval.charts import code_frequencies, curves, usage_curves
from smalti.eval.figures import Figure

Image = NDArray[np.uint8]
WIDEST = 16  # pairs of a row
ARROWS = {"higher": "↑", "lower": "↓"}
TITLES = {
    "train-tokenizer": "Tokenizer",
    "train-generator": "Generator",
    "classifier": "Classifier of the evaluation",
}


class ClassRow(NamedTuple):
    """One class: how many samples and validation images, and which share of each is classified as such.

    A share of no images is None.
    """

    name: str
    samples: int
    classified_as_intended: float | None
    validation_images: int
    classifier_accuracy: float | None


@dataclass(frozen=True)
class Report:
    """What a report shows.

    Args:
        recipe: its name.
        summary: its summary.
        note: what must be said beside the figures.
        figures: by name, all those of `summary.json`.
        seconds: of the whole run.
        curves: lines of `metrics.jsonl` by stage.
        pairs: originals and reconstructions, uint8 `(H, W, 3)`.
        code_counts: of each stream, how often each code occurs.
        rows: classes to show.
        samples: images uint8 `(H, W, 3)` of each class, for at least as many classes as there are rows.
        protocol: what all figures share.
        resolved_recipe: YAML.
    """

    recipe: str
    summary: str
    note: str
    figures: dict[str, Figure]
    seconds: float
    curves: dict[str, list[dict[str, Any]]]
    pairs: Sequence[tuple[Image, Image]]
    code_counts: Sequence[NDArray[np.int64]]
    rows: Sequence[ClassRow]
    samples: Sequence[Sequence[Image]]
    protocol: dict[str, Any]
    resolved_recipe: str


def render(report: Report) -> str:
    """The report as HTML; the same report gives the same text."""
    template = Template(page_part("report.html"))
    figures = report.figures
    sample_columns = max((len(images) for images in report.samples), default=1)
    pair_columns = max(1, min(len(report.pairs), WIDEST))
    return template.substitute(
        style=page_part("style.css"),
        kind="report of a run",
        columns=f"--sample-columns: {sample_columns}; --pair-columns: {pair_columns}",
        title=escape(report.recipe),
        summary=escape(report.summary),
        note=escape(report.note),
        tiles="\n".join(_tiles(report)),
        samples_about=escape(
            f"The first samples of each class, none picked. {figures['classified_as_intended'].text()} of all are "
            "given the intended class by the classifier; real images get theirs in "
            f"{figures['classifier_accuracy'].text()} of cases (the tick of each bar)."
        ),
        classes="\n".join(_classes(report)),
        pairs="\n".join(f'<div class="pair">{picture(one)}{picture(other)}</div>' for one, other in report.pairs),
        codes_about=escape(
            f"{figures['codebook_usage'].text()} of the codes are used; the entropy is that of "
            f"{figures['codebook_perplexity'].text()} used evenly."
        ),
        codes=code_frequencies(report.code_counts),
        curves="\n".join(_charts(report)),
        table="\n".join(table_row(figure) for figure in figures.values()),
        protocol=escape(json.dumps(report.protocol, indent=2)),
        resolved_recipe=escape(report.resolved_recipe),
        footer=escape(f"{versions(report.protocol)}."),
    )


def versions(record: Mapping[str, Any]) -> str:
    """The libraries of a protocol or record with their versions."""
    return ", ".join(f"{name} {version}" for name, version in record["libraries"].items())


def page_part(name: str) -> str:
    """A text file of this package: the style of all pages, or a page with places for what is shown.

    What all pages share is put in for `$page_head` and `$page_figures`, of files so called.
    """
    shared = {place: _text(f"{place}.html").removesuffix("\n") for place in ("page_head", "page_figures")}
    return Template(_text(name)).safe_substitute(shared)


def _text(name: str) -> str:
    return resources.files("smalti.eval").joinpath(name).read_text(encoding="utf-8")


def _charts(report: Report) -> Iterator[str]:
    for stage, lines in report.curves.items():
        title = TITLES.get(stage, stage)
        yield chart(title, curves(lines))
        usage = usage_curves(lines)
        if usage is not None:
            yield chart(f"{title}: codes in use", usage)


def chart(title: str, drawing: str) -> str:
    """A drawing with its title."""
    return f'<div class="card chart"><h3>{escape(title)}</h3>{drawing}</div>'


def _tiles(report: Report) -> list[str]:
    figures = report.figures
    text = {name: figure.text() for name, figure in figures.items()}
    minutes, seconds = divmod(round(report.seconds), 60)
    return [
        tile(figures["psnr"].title, text["psnr"], f"of held-out reconstructions; SSIM {text['ssim']}"),
        tile(figures["codebook_usage"].title, text["codebook_usage"], f"perplexity {text['codebook_perplexity']}"),
        tile("Run time", f"{minutes} min {seconds} s", "all stages, as recorded"),
        tile(
            figures["classified_as_intended"].title,
            text["classified_as_intended"],
            f"of the samples; real images: {text['classifier_accuracy']}",
        ),
        tile(
            figures["frechet_distance"].title,
            text["frechet_distance"],
            f"in the classifier's features, not FID; real images: {text['frechet_distance_real']}",
        ),
        tile("Precision and recall", f"{text['precision']} · {text['recall']}", "in the classifier's features"),
    ]


def tile(title: str, value: str, more: str) -> str:
    """One figure in large letters."""
    shown = escape(value)
    for unit in (" dB", " %", " min", " s"):
        shown = shown.replace(unit, f"<small>{unit}</small>")
    return (
        f'<div class="tile"><div class="title">{escape(title)}</div><div class="value">{shown}</div>'
        f'<div class="more">{escape(more)}</div></div>'
    )


def _classes(report: Report) -> list[str]:
    cells = ['<div class="head"></div><div class="head"></div><div class="head">classified as intended</div>']
    for row, images in zip(report.rows, report.samples, strict=False):
        strip = "".join(map(picture, images))
        cells.append(f'<div class="name">{escape(row.name)}</div>{_meter(row)}<div class="strip">{strip}</div>')
    return cells


def _meter(row: ClassRow) -> str:
    """A bar of the share of samples, with a tick at that of real images."""
    if row.classified_as_intended is None:
        return '<div class="meter">no samples</div>'
    percent, real = 100 * row.classified_as_intended, row.classifier_accuracy
    tick = "" if real is None else f'<div class="tick" style="left: {100 * real:.1f}%" title="real images"></div>'
    return (
        f'<div class="meter"><div class="track"><div class="fill" style="width: {percent:.1f}%"></div>{tick}</div>'
        f'<div class="share">{percent:.0f} %</div></div>'
    )


def picture(image: Image) -> str:
    """A PNG inside the page."""
    return f'<img alt="" src="data:image/png;base64,{base64.b64encode(png_bytes(image)).decode()}">'


def table_row(figure: Figure) -> str:
    """A figure with all that it depends on."""
    parts = [
        ("measured on", figure.measured),
        ("reference", figure.reference),
        ("extractor", figure.extractor),
        ("parts", figure.spread()),
        ("note", figure.warning),
    ]
    lines = [escape(figure.definition), *(f"<b>{name}</b> {escape(text)}" for name, text in parts if text)]
    return (
        f'<tr><td class="name">{escape(figure.title)}</td>'
        f'<td class="value">{escape(figure.text())} '
        f'<span class="arrow" title="{figure.better} is better">{ARROWS[figure.better]}</span></td>'
        f'<td class="protocol">{"<br>".join(lines)}</td></tr>'
    )
