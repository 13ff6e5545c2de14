"""Classes by name: those that a user asks for, and the names that a generator without a recipe has for its own."""

from __future__ import annotations

import importlib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from smalti.core.errors import UserError
from smalti.core.files import read_json
from smalti.core.options import sentences

TRAINED_ON = "trained_on.json"
IMAGENET_CLASSES = 1000


class TrainedOn(BaseModel):
    """What `trained_on.json` tells, beside the weights of a generator of a run.

    Args:
        tokenizer: fingerprint of its tokenizer.
        classes: names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokenizer: str
    classes: tuple[str, ...]


def read_trained_on(generator: Path) -> TrainedOn:
    """What a generator's folder tells.

    Raises:
        UserError: there is no `trained_on.json`, or it is damaged.
    """
    path = generator / TRAINED_ON
    try:
        return TrainedOn.model_validate(read_json(path, "what the generator was trained on"))
    except ValidationError as error:
        raise UserError(f"{path} cannot be used: {sentences(error)}") from None


def class_names(generator: str | Path, classes: int) -> tuple[str, ...]:
    """What the generator's folder tells; 1000 classes of published ones are ImageNet's, in the order of its folders.

    Args:
        generator: a folder, or whatever else it was loaded from.
        classes: how many there are.

    Returns:
        A name for each, or nothing where they are not known, or torchvision, which has ImageNet's, is not installed.

    Raises:
        UserError: the folder's `trained_on.json` is damaged.
    """
    if (Path(generator) / TRAINED_ON).is_file():
        return read_trained_on(Path(generator)).classes
    if classes != IMAGENET_CLASSES:
        return ()
    try:
        weights = importlib.import_module("torchvision.models").ResNet18_Weights
    except ImportError:
        return ()
    return tuple(weights.IMAGENET1K_V1.meta["categories"])


def read_classes(given: str) -> list[int | str]:
    """Classes as `--classes` names them, by numbers or names with commas between them."""
    parts = [part for part in map(str.strip, given.split(",")) if part]
    return [int(part) if part.removeprefix("-").isdecimal() else part for part in parts]
