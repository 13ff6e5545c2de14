"""What a stage of the pipeline is, and what it gets to know."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from smalti.core.progress import Reporter
from smalti.core.recipe import Recipe
from smalti.core.run_folder import RunFolder


@dataclass(frozen=True)
class Context:
    """One run: where its files are, what it shall do, on which device, and whom it tells."""

    run: RunFolder
    recipe: Recipe
    device: str
    reporter: Reporter


class Stage(ABC):
    """A step from files to files in the run folder.

    `run()` must be able to go on wherever an earlier process was killed, and end with the same files. The
    pipeline calls it only where its output is missing or stale.

    Attributes:
        name: what the command line and the run folder call it.
        sections: dotted parts of the recipe that its output depends on.
        after: stages whose output it reads.
        outputs: paths in the run folder that it writes; removed when they are stale.
    """

    name: ClassVar[str]
    sections: ClassVar[tuple[str, ...]]
    after: ClassVar[tuple[str, ...]]
    outputs: ClassVar[tuple[str, ...]]

    def __init__(self, context: Context) -> None:
        self.context = context

    @abstractmethod
    def run(self) -> None:
        """Do the work, from where it was."""
