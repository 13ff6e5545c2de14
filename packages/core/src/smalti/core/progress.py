"""Telling the user how far the work is: a bar with rate and remaining time on a terminal, lines in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Task as RichTask
from rich.text import Text

LINE_SECONDS = 10.0


class Advance(Protocol):
    """Reports work done since the last call; `note` is shown beside the bar, e.g. `loss 0.031`."""

    def __call__(self, amount: int = 1, note: str | None = None) -> None:
        """Report `amount` more units."""


class Reporter:
    """Writes to standard error; on other ranks than the first it is silent."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, highlight=False, emoji=False)

    def say(self, sentence: str) -> None:
        """One line."""
        if not self.quiet:
            self.console.print(sentence, markup=False, soft_wrap=True)

    @contextmanager
    def progress(self, title: str, total: int | None, done: int = 0, unit: str = "it") -> Iterator[Advance]:
        """Show progress of `total` units, None where that is not known; earlier processes did `done` of them."""
        if self.quiet:
            yield _silent
        elif self.console.is_terminal:
            with self._bar(title, total, done, unit) as advance:
                yield advance
        else:
            yield _Lines(title, total, done, unit)

    @contextmanager
    def _bar(self, title: str, total: int | None, done: int, unit: str) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            _Rate(unit),
            TimeRemainingColumn(),
            TextColumn("left"),
            TextColumn("{task.fields[note]}", style="dim"),
        )
        with Progress(*columns, console=self.console, refresh_per_second=4) as progress:
            task = progress.add_task(title, total=total, completed=done, note="")

            def advance(amount: int = 1, note: str | None = None) -> None:
                progress.update(task, advance=amount)
                if note is not None:
                    progress.update(task, note=note)

            yield advance


def _silent(amount: int = 1, note: str | None = None) -> None:
    """Report nothing."""


class _Rate(ProgressColumn):
    """Units per second, over rich's moving window."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: RichTask) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f} {self.unit}/s" if speed else f"-- {self.unit}/s", style="progress.data.speed")


class _Lines:
    """Progress as plain lines, one every `LINE_SECONDS` and one at the end."""

    def __init__(self, title: str, total: int | None, done: int, unit: str) -> None:
        self.title, self.total, self.done, self.unit = title, total, done, unit
        self.first_done = done
        self.started = self.printed = time.monotonic()
        self.note = ""

    def __call__(self, amount: int = 1, note: str | None = None) -> None:
        self.done += amount
        self.note = self.note if note is None else note
        now = time.monotonic()
        if self.done != self.total and now - self.printed < LINE_SECONDS:
            return
        self.printed = now
        rate = (self.done - self.first_done) / max(now - self.started, 1e-9)
        line = f"{self.title}: {self.done}/{self.total or '?'}, {rate:.1f} {self.unit}/s"
        if self.total is not None and rate:
            line += f", {(self.total - self.done) / rate:.0f} s left"
        print(f"{line}, {self.note}" if self.note else line, file=sys.stderr, flush=True)  # noqa: T201
