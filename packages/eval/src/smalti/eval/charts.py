"""Charts of a report as inline SVG that takes its colours from the page, light or dark."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

# matplotlib wants colours, the page has variables: these stand for them until the drawing is text.
INK, LINE = "#010203", "#040506"
SERIES = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05", "#0a0b06")
VARIABLES = {INK: "var(--soft)", LINE: "var(--line)"} | {
    color: f"var(--series-{number})" for number, color in enumerate(SERIES, 1)
}
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "smalti",
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
HEALTH = "codebook_health"  # in the lines of a training that sees tokens
LOG_SPREAD = 20.0
MOST_POINTS = 1024


def curves(lines: Sequence[dict[str, Any]]) -> str:
    """Every loss of one stage over its steps; `lines` are those of `metrics.jsonl`.

    Codebook health has a chart of its own, `usage_curves`; findings of validations are left out. The scale is
    logarithmic where the values are positive and differ by more than `LOG_SPREAD` times.
    """
    losses = {name for name, value in lines[-1].items() if isinstance(value, int | float)}
    names = [name for name in lines[-1] if name in losses - {"step", "learning_rate"}]
    series = {name: [(line["step"], line[name]) for line in lines if name in line] for name in names}

    def draw(axes: Axes) -> None:
        for color, (name, points) in zip(_colors(len(series)), series.items(), strict=True):
            axes.plot(*zip(*points, strict=True), color=color, linewidth=1.7, label=name.replace("_", " "))
        values = [value for points in series.values() for _, value in points]
        if min(values) > 0 and max(values) > LOG_SPREAD * min(values):
            axes.set_yscale("log")
        _over_steps(axes, min(len(series), 2))

    return svg(draw, 3.5, 2.7)


def usage_curves(lines: Sequence[dict[str, Any]]) -> str | None:
    """Usage of the codebooks over the steps of a training, None where its lines say nothing about it.

    One curve for each scale, the mean over its streams, where there are scales; else one for each stream.
    Dots mark the streams that collapsed.
    """
    known = [line for line in lines if HEALTH in line]
    if not known:
        return None
    steps = [line["step"] for line in known]
    health = [line[HEALTH] for line in known]
    if "usage_of_scales" in health[-1]:
        kind, values = "scale", [[fmean(usage) for usage in found["usage_of_scales"]] for found in health]
    else:
        kind, values = "stream", [found["usage"] for found in health]
    falls = [
        (step, 100 * found["usage"][stream])
        for step, found in zip(steps, health, strict=True)
        for stream in found.get("collapsed", ())
    ]

    def draw(axes: Axes) -> None:
        count = len(values[-1])
        for index, color in enumerate(_colors(count)):
            percent = [100 * value[index] for value in values]
            label = f"{kind} {index + 1}" if count > 1 else "usage"
            # Ten scales share six colours.
            dashes = ("-", "--", ":")[index // len(SERIES) % 3]
            axes.plot(steps, percent, color=color, linestyle=dashes, linewidth=1.7, label=label)
        if falls:
            axes.plot(*zip(*falls, strict=True), "o", color=INK, markersize=5, label="collapse")
        axes.set_ylabel("codes in use (%)")
        axes.set_ylim(0, 103)
        _over_steps(axes, 3)

    return svg(draw, 3.5, 2.7)


def _over_steps(axes: Axes, columns: int) -> None:
    axes.set_xlabel("step")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.margins(x=0.02)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, handlelength=1.2, columnspacing=1.2)


def code_frequencies(counts: Sequence[NDArray[np.int64]]) -> str:
    """How often each code of each stream occurs, most frequent first, against the even share."""

    def draw(axes: Axes) -> None:
        for stream, (color, values) in enumerate(zip(_colors(len(counts)), counts, strict=True), 1):
            shares = np.sort(values)[::-1] / max(int(values.sum()), 1) * len(values)
            ranks = np.unique(np.linspace(0, len(shares) - 1, min(len(shares), MOST_POINTS)).astype(int))
            edges = np.linspace(0, 100, len(ranks) + 1)
            opacity = 0.25 if len(counts) > 1 else 0.55
            axes.stairs(shares[ranks], edges, fill=True, color=color, alpha=opacity, linewidth=0)
            axes.stairs(shares[ranks], edges, baseline=None, color=color, linewidth=1.4, label=f"stream {stream}")
        axes.axhline(1.0, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate("even use", (100, 1.0), (0, 3), textcoords="offset points", ha="right", va="bottom", fontsize=8.5)
        axes.set_xlabel("codes, most frequent first (% of the codebook)")
        axes.set_ylabel("frequency / even share")
        axes.set_xlim(0, 100)
        axes.set_ylim(bottom=0)
        if len(counts) > 1:
            axes.legend()

    return svg(draw, 9.4, 2.5)


def _colors(count: int) -> list[str]:
    return [SERIES[index % len(SERIES)] for index in range(count)]


def svg(draw: Callable[[Axes], None], width: float, height: float) -> str:
    """An `<svg>` element of so many inches; equal drawings are equal texts."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot())
        figure.patch.set_visible(False)
        figure.axes[0].patch.set_visible(False)
        buffer = io.BytesIO()
        metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", metadata=metadata)
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    for color, variable in VARIABLES.items():
        text = text.replace(color, variable)
    return text
