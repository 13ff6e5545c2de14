"""Classes by name: those that a user asks for, and the names that a generator without a recipe has for its own."""

from __future__ import annotations

import importlib
from pathlib import Path

from smalti.core.files import read_json

TRAINED_ON = "trained_on.json"
"""Beside the weights of a generator of a run: the fingerprint of its tokenizer, and the names of the classes."""

IMAGENET_CLASSES = 1000


def class_names(generator: str | Path, classes: int) -> tuple[str, ...]:
    """What the generator's folder tells; 1000 classes of published ones are ImageNet's, in the order of its folders.

    Args:
        generator: a folder, or whatever else it was loaded from.
        classes: how many there are.

    Returns:
        A name for each, or nothing where they are not known, or torchvision, which has ImageNet's, is not installed.
    """
    path = Path(generator) / TRAINED_ON
    if path.is_file():
        return tuple(read_json(path, "what the generator was trained on")["classes"])
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
