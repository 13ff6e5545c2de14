"""Experiment trackers beside `metrics.jsonl`: TensorBoard, Weights & Biases and Trackio, by accelerate's adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from numpy.typing import NDArray

from smalti.core.errors import UserError
from smalti.core.run_folder import RunFolder, fingerprint

EXTRAS = {"tensorboard": "train", "wandb": "wandb", "trackio": "trackio"}


class Trackers:
    """What the first process tells the trackers of a stage.

    Args:
        names: of `EXTRAS`.
        run: where TensorBoard's files go, in `tensorboard/<stage>`; its name is the other trackers' project.
        stage: of the run.
        step: from which it goes on; TensorBoard forgets what it was told after that.
        settings: of the run, for those that show them.

    Raises:
        UserError: a tracker that is not installed.
    """

    def __init__(
        self, names: Sequence[str], run: RunFolder, stage: str, step: int, settings: Mapping[str, Any]
    ) -> None:
        check_installed(names)
        self._trackers = [_tracker(name, run, stage, step) for name in names]
        for tracker in self._trackers:
            tracker.start()
            if not isinstance(tracker, TensorBoardTracker):
                tracker.store_init_configuration(dict(settings))

    def log(self, line: Mapping[str, Any]) -> None:
        """The numbers of a line of `metrics.jsonl`, lists and mappings by dotted names."""
        values = _flat({name: value for name, value in line.items() if name not in ("stage", "step")})
        for tracker in self._trackers:
            tracker.log(values, step=line["step"])

    def show(self, name: str, picture: NDArray[np.uint8], step: int) -> None:
        """A picture uint8 `(H, W, 3)`."""
        for tracker in self._trackers:
            if isinstance(tracker, TensorBoardTracker):
                tracker.log_images({name: picture[None]}, step=step, dataformats="NHWC")
            elif isinstance(tracker, WandBTracker):
                tracker.log_images({name: [picture]}, step=step)

    def finish(self) -> None:
        """Write out what is left."""
        for tracker in self._trackers:
            tracker.finish()


def check_installed(names: Sequence[str]) -> None:
    """Raise a `UserError` for the first tracker that is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise UserError(f"the tracker {name} needs the extra smalti-core[{EXTRAS[name]}], which is not installed")


def _tracker(name: str, run: RunFolder, stage: str, step: int) -> GeneralTracker:
    project = run.path.resolve().name
    if name == "tensorboard":
        # What a killed process told beyond the checkpoint will be told again.
        return TensorBoardTracker(stage, run / "tensorboard", purge_step=step + 1)
    if name == "wandb":
        identity = fingerprint([str(run.path.resolve()), stage])
        return WandBTracker(project, name=stage, id=identity, resume="allow", dir=str(run.path))
    return TrackioTracker(project, name=stage, resume="allow")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in values.items():
        items = dict(enumerate(value)) if isinstance(value, list) else value
        if isinstance(items, Mapping):
            found |= _flat({str(key): item for key, item in items.items()}, f"{prefix}{name}/")
        else:
            found[prefix + name] = items
    return found
