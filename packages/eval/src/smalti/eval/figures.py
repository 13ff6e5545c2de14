"""Figures of merit that carry their protocol: without it a number cannot be compared with another."""

from __future__ import annotations

from importlib import metadata
from typing import Literal

from pydantic import Field

from smalti.core.options import Options

LIBRARIES = ("smalti-eval", "smalti-core", "torch", "torch-fidelity", "numpy", "pillow")


class Figure(Options):
    """One measured number, and all that it depends on.

    Args:
        name: in `summary.json`.
        title: for people.
        value: the number, in `unit`.
        unit: `dB`, `share` (0 to 1), `codes`, `bits`, or empty.
        better: which direction is.
        definition: formula, data range, paper.
        measured: what was measured, and how many.
        reference: what it was compared with, and how many; empty where with nothing.
        extractor: which network gave the features, with its fingerprint; empty where none did.
        interval: ends of the 95 % confidence interval, where one was asked for.
        parts: what `value` is the mean or the whole of, for instance by class; empty where it has no parts.
        warning: what makes it less than it seems; empty for nothing.
    """

    name: str
    title: str
    value: float
    unit: str = ""
    better: Literal["higher", "lower"] = "higher"
    definition: str
    measured: str
    reference: str = ""
    extractor: str = ""
    interval: tuple[float, float] | None = None
    parts: dict[str, float] = Field(default_factory=dict)
    warning: str = ""

    def text(self) -> str:
        """The value as people read it."""
        return self._text(self.value)

    def interval_text(self) -> str:
        """The ends of the interval as people read them, empty where there is none."""
        return "" if self.interval is None else " to ".join(map(self._text, self.interval))

    def _text(self, value: float) -> str:
        if self.unit == "share":
            return f"{100 * value:.1f} %"
        size = abs(value)
        number = f"{value:.3g}" if 0 < size < 0.1 else f"{value:.{3 if size < 1 else 2 if size < 10 else 1}f}"
        return f"{number} {self.unit}".rstrip()

    def spread(self) -> str:
        """The lowest and the highest of the parts, empty where there are none."""
        if len(self.parts) < 2:
            return ""
        ends = (function(self.parts, key=lambda name: self.parts[name]) for function in (min, max))
        return " to ".join(f"{self._text(self.parts[name])} ({name})" for name in ends)

    def exact(self) -> str:
        """The value with six digits, and its interval: what a comparison needs."""
        ends = f", 95 % between {self.interval[0]:.6g} and {self.interval[1]:.6g}" if self.interval else ""
        unit = f" {self.unit}" if self.unit not in ("", "share") else ""
        return f"{self.value:.6g}{unit}{ends}"


def library_versions() -> dict[str, str]:
    """The versions of what computed the figures."""
    return {name: metadata.version(name) for name in LIBRARIES}
