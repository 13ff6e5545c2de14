"""Charts of an evaluation of images: precision against recall, and how PSNR is spread."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from smalti.eval.charts import INK, SERIES, svg

BINS = 40


def precision_recall_chart(precision: float, recall: float) -> str:
    """Where the samples lie between faithful and complete; the perfect place is the upper right corner."""

    def draw(axes: Axes) -> None:
        axes.plot([recall, recall, 0], [0, precision, precision], color=SERIES[0], linewidth=1, linestyle=(0, (4, 3)))
        axes.plot([recall], [precision], "o", color=SERIES[0], markersize=9, clip_on=False)
        axes.annotate(
            f"{100 * precision:.1f} % · {100 * recall:.1f} %",
            (recall, precision),
            (-8 if recall > 0.6 else 8, -14 if precision > 0.8 else 8),
            textcoords="offset points",
            ha="right" if recall > 0.6 else "left",
            color=INK,
        )
        axes.set_xlabel("recall")
        axes.set_ylabel("precision")
        axes.set_xlim(0, 1.02)
        axes.set_ylim(0, 1.02)

    return svg(draw, 3.5, 2.9)


def psnr_histogram(values: Tensor) -> str:
    """How many images have which PSNR, values `(N,)` in dB; a line at the mean."""

    def draw(axes: Axes) -> None:
        numbers = values.numpy()
        counts, edges = np.histogram(numbers, bins=min(BINS, max(5, len(numbers) // 4)))
        axes.stairs(counts, edges, fill=True, color=SERIES[0], alpha=0.55)
        axes.axvline(float(numbers.mean()), color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"mean {numbers.mean():.2f} dB",
            (float(numbers.mean()), 1),
            (4, -2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            va="top",
        )
        axes.set_xlabel("PSNR (dB)")
        axes.set_ylabel("images")

    return svg(draw, 5.6, 2.9)
