"""The files of an evaluation of images: `results.json`, a report as HTML and Markdown, a table in LaTeX."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from smalti.core.data.images import grid, png_bytes
from smalti.core.files import write_bytes, write_json, write_text
from smalti.eval.charts import code_frequencies
from smalti.eval.figures import Figure
from smalti.eval.image_charts import precision_recall_chart, psnr_histogram
from smalti.eval.image_evaluation import Evaluation
from smalti.eval.image_pairs import Pair, PairResults
from smalti.eval.report import ARROWS, chart, page_part, picture, table_row, tile, versions

LATEX = {
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "∞": r"$_\infty$",
    "é": r"\'e",
    "%": r"\%",
    "&": r"\&",
    "_": r"\_",
    "#": r"\#",
}


def write_evaluation(folder: Path, evaluation: Evaluation) -> None:
    """Write all files; what an earlier evaluation left there under the same names is replaced."""
    write_json(folder / "results.json", evaluation.content())
    write_text(folder / "report.html", render(evaluation))
    write_text(folder / "report.md", markdown(evaluation))
    write_text(folder / "table.tex", latex(evaluation))
    if evaluation.pairs is not None:
        write_bytes(folder / "pairs.png", png_bytes(_pairs_grid(evaluation.pairs)))


def render(evaluation: Evaluation) -> str:
    """The report as one HTML file that needs nothing else; the same evaluation gives the same text."""
    figures = {figure.name: figure for figure in evaluation.figures}
    return Template(page_part("image_report.html")).substitute(
        style=page_part("style.css"),
        kind="evaluation of images",
        columns=f"--pair-columns: {max(len(evaluation.pairs.worst), 1) if evaluation.pairs else 1}",
        title=escape(evaluation.title),
        summary=escape(evaluation.summary),
        tiles="\n".join(_tiles(figures)),
        warnings="\n".join(f'<p class="note">{escape(warning)}</p>' for warning in evaluation.warnings),
        charts=_charts(figures, evaluation),
        pairs=_pairs(evaluation.pairs),
        table="\n".join(table_row(figure) for figure in evaluation.figures),
        latex=escape(latex(evaluation)),
        record=escape(json.dumps(evaluation.record, indent=2)),
        footer=escape(f"{versions(evaluation.record)}."),
    )


def markdown(evaluation: Evaluation) -> str:
    """The figures with their protocol, as Markdown."""
    lines = [
        f"# {evaluation.title}",
        "",
        evaluation.summary,
        "",
        "| figure | value | 95 % interval |",
        "|---|---|---|",
    ]
    lines += [
        f"| {figure.title} {ARROWS[figure.better]} | {figure.text()} | {figure.interval_text()} |"
        for figure in evaluation.figures
    ]
    lines += ["", *(f"> {warning}" for warning in evaluation.warnings)]
    lines += ["", "## How they were measured", ""]
    for figure in evaluation.figures:
        spread = f"; {figure.spread()}" if figure.spread() else ""
        lines.append(f"- **{figure.title}**: {figure.definition}{spread}")
    lines += [f"- {title}: {text}" for title, text in _depends_on(evaluation.record).items()]
    lines.append(f"- versions: {versions(evaluation.record)}")
    if evaluation.pairs is not None:
        lines += ["", "The worst and the best by PSNR, originals above:", "", "![pairs](pairs.png)"]
    return "\n".join(lines) + "\n"


def latex(evaluation: Evaluation) -> str:
    """A table to paste into a paper; the comment says under which protocol its numbers hold."""
    figures = evaluation.figures
    depends = [f"{title} {text}" for title, text in _depends_on(evaluation.record).items()]
    heads = [_escaped(f"{figure.title} {ARROWS[figure.better]}") for figure in figures]
    values = [_digits(figure) for figure in figures]
    return "\n".join(
        [
            f"% {', '.join([evaluation.title, *depends])}",
            rf"\begin{{tabular}}{{l{'r' * len(figures)}}}",
            r"\hline",
            rf"Method & {' & '.join(heads)} \\",
            r"\hline",
            rf"Ours & {' & '.join(values)} \\",
            r"\hline",
            r"\end{tabular}",
            "",
        ]
    )


def _escaped(text: str) -> str:
    return "".join(LATEX.get(letter, letter) for letter in text)


def _digits(figure: Figure) -> str:
    """As papers print them: without a unit, shares as numbers."""
    if figure.unit == "share":
        return f"{figure.value:.2f}"
    return f"{figure.value:.3g}" if 0 < abs(figure.value) < 0.1 else f"{figure.value:.{4 if figure.value < 1 else 2}f}"


def _depends_on(record: Mapping[str, Any]) -> dict[str, str]:
    """What figures depend on beside their protocol, each in a few words."""
    found = {"images": f"{record['images']['source']} {record['images']['sha256'][:16]}".rstrip()}
    if record["reference"]:
        found["reference"] = f"{record['reference']['source']} {record['reference']['sha256'][:16]}"
    if record["extractor"]:
        found["extractor"] = f"{record['extractor']['name']} {record['extractor']['fingerprint']}"
    return found


def _tiles(figures: dict[str, Figure]) -> list[str]:
    tiles = []
    for figure in figures.values():
        ends = f"95 %: {figure.interval_text()}" if figure.interval else ""
        tiles.append(tile(figure.title, figure.text(), ends or figure.spread() or f"{figure.better} is better"))
    return tiles


def _charts(figures: dict[str, Figure], evaluation: Evaluation) -> str:
    drawn = []
    if {"precision", "recall"} <= figures.keys():
        drawing = precision_recall_chart(figures["precision"].value, figures["recall"].value)
        drawn.append(chart("Precision and recall", drawing))
    if evaluation.pairs is not None:
        drawn.append(chart("PSNR of the images", psnr_histogram(evaluation.pairs.psnr)))
    wide = ""
    if evaluation.code_counts:
        wide = chart("Codes", code_frequencies([np.array(counts) for counts in evaluation.code_counts]))
    if not (drawn or wide):
        return ""
    return f'<section><h2>Charts</h2><div class="charts two">{"".join(drawn)}</div>{wide}</section>'


def _pairs(pairs: PairResults | None) -> str:
    if pairs is None:
        return ""
    return (
        "<section><h2>Worst and best reconstructions</h2>"
        '<p class="about">By PSNR; the numbers are decibels and the names those of the images.</p>'
        f"{_strip('Worst', pairs.worst)}{_strip('Best', pairs.best)}</section>"
    )


def _strip(title: str, pairs: Sequence[Pair]) -> str:
    cells = "".join(
        f'<div class="pair" title="{escape(pair.name)}">{picture(pair.reference.numpy())}{picture(pair.image.numpy())}'
        f"<small>{pair.psnr:.1f}</small></div>"
        for pair in pairs
    )
    return (
        f'<div class="card strips"><h3>{title}</h3><div class="pairs"><div class="sides"><span>original</span>'
        f'<span>decoded</span></div><div class="all">{cells}</div></div></div>'
    )


def _pairs_grid(pairs: PairResults) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Four rows: the worst, originals above reconstructions, then the best; each image at the upper left."""
    rows = [
        part
        for group in (pairs.worst, pairs.best)
        for part in zip(*((p.reference, p.image) for p in group), strict=True)
    ]
    height, width = (max(image.shape[axis] for row in rows for image in row) for axis in (0, 1))
    places = np.full((len(rows) * len(rows[0]), height, width, 3), 255, np.uint8)
    for place, image in zip(places, (image for row in rows for image in row), strict=True):
        place[: image.shape[0], : image.shape[1]] = image.numpy()
    return grid(places, len(rows[0]))
