"""A run folder: the files of one run, which stages are done, and how a later process goes on.

recipe.yaml        the resolved recipe
tokenizer/         config.json, model.safetensors, ema.safetensors
tokenizer-best/    the same, at the best validation so far
autoencoder/, autoencoder-best/   in their place, where the recipe trains an autoencoder
images/            held-out images beside their reconstructions, by step
drawn/             what the generator drew, by step
tokens/            token shards (tar) and layout.json
generator/         as tokenizer/, and trained_on.json: its tokenizer and the names of the classes
samples/           samples.npz (ADM's layout), grid.png, images/ and trace.gif where asked for
evaluation/        the classifier, and what was measured in pieces
metrics.jsonl      training curves
tensorboard/       the same for TensorBoard, where the recipe asks for it
summary.json, report.html
state/             stages.json, and checkpoints that hold everything needed to go on
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smalti.core.errors import UserError, few
from smalti.core.files import disk_errors, parse_json, read_json, remove_temporaries, write_json, write_text
from smalti.core.overrides import differences
from smalti.core.recipe import Recipe, dump_recipe, load_recipe


class RunFolder:
    """Paths and state of one run. Only the first process of a distributed run may write through it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def state(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "state"

    def prepare(self, recipe: Recipe, *, force: bool = False) -> None:
        """Make the folder ready for `recipe`.

        Raises:
            UserError: the folder holds a run of another recipe and `force` is off (says what differs), or
                holds something that is no run at all.
        """
        with disk_errors(self.path):
            known = self.path / "recipe.yaml"
            if known.exists() and not force:
                self._check_same(recipe)
            elif not known.exists() and self.path.is_dir() and any(self._foreign()):
                raise UserError(f"{self.path} is not empty and not a run folder: choose another with --out")
            self.state.mkdir(parents=True, exist_ok=True)
            remove_temporaries(self.path)
        text = dump_recipe(recipe)
        if not known.exists() or known.read_bytes() != text.encode():
            write_text(known, text)

    def _foreign(self) -> Iterator[Path]:
        return (path for path in self.path.iterdir() if path.name not in ("state", ".recipe.yaml.part"))

    def _check_same(self, recipe: Recipe) -> None:
        try:
            there = load_recipe(self.path).decisive()
        except UserError as error:
            raise UserError(f"the recipe in {self.path} cannot be read ({error}); --force replaces it") from None
        found = differences(there, recipe.decisive())
        if found:
            raise UserError(
                f"{self.path} holds a run of another recipe ({few(found, 5, between='; ')}); choose another folder "
                f"with --out, or --force to redo what depends on it"
            )

    @contextmanager
    def locked(self, *, first: bool = True) -> Iterator[None]:
        """Hold the folder for this process; the lock goes when the process ends, however it ends.

        Args:
            first: whether this is the first process of the run; the others hold nothing.
        """
        if not first:
            yield
            return
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; expected a folder for the run")
        with disk_errors(self.path):
            self.state.mkdir(parents=True, exist_ok=True)
            file = (self.state / "lock").open("w")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process is working in {self.path}") from None
            yield

    def stages(self) -> dict[str, dict[str, Any]]:
        """What is known of each stage: `fingerprint`, `done`, `seconds` of the process that finished it."""
        path = self.state / "stages.json"
        if not path.exists():
            return {}
        stages = read_json(path, "the state of a run's stages")
        if not isinstance(stages, dict) or not all(isinstance(known, dict) for known in stages.values()):
            raise UserError(
                f"{path} is damaged, expected what is known of each stage: remove it to do all stages again"
            )
        return stages

    def record(self, stage: str, **values: Any) -> None:
        """Change what is known of a stage."""
        stages = self.stages()
        stages[stage] = {**stages.get(stage, {}), **values}
        write_json(self.state / "stages.json", stages)

    def remove(self, names: tuple[str, ...]) -> None:
        """Remove outputs, files or folders."""
        for name in names:
            path = self.path / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl` that a stage wrote."""
        return [line for line, _ in self._metrics() if line["stage"] == stage]

    def _metrics(self) -> Iterator[tuple[dict[str, Any], str]]:
        """Every line of `metrics.jsonl`, read and as it stands, but for the one at which a process was killed."""
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        for number, text in enumerate(lines, 1):
            try:
                line = parse_json(text)
                known = isinstance(line["stage"], str) and isinstance(line["step"], int)
            except (ValueError, KeyError, TypeError):
                known = False
            if known:
                yield line, text.decode().rstrip()
            elif text.endswith(b"\n"):
                raise UserError(f"{path} is damaged, expected stage and step in line {number}: remove that line")

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add one line to `metrics.jsonl`."""
        with disk_errors(self.path / "metrics.jsonl"), (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def rewind_metrics(self, stage: str, step: int) -> None:
        """Drop what a stage wrote after `step`: those steps will be done again."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        kept = [text + "\n" for line, text in self._metrics() if line["stage"] != stage or line["step"] <= step]
        write_text(path, "".join(kept))


def fingerprint(content: Any) -> str:
    """Sixteen hex digits that identify plain data."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
