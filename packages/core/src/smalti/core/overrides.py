"""Options as plain data: changing them by dotted path, `tokenizer.quantizer.codebook_size=1024`, and comparing them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from smalti.core.errors import UserError


def apply_override(content: dict[str, Any], override: str) -> None:
    """Set one dotted path of plain data in place; list entries by number."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise UserError(f"{override!r} is not an override: expected dotted.path=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{path}: {text!r} is not a YAML value") from None
    *parents, last = path.split(".")
    place: Any = content
    for depth, key in enumerate(parents):
        child = _child(place, key, parents[:depth])
        if child is None:
            child = {}
            place[key] = child
        elif isinstance(child, str):  # a component given by its bare name
            child = {"name": child}
            place[int(key) if isinstance(place, list) else key] = child
        place = child
    if isinstance(place, list):
        _child(place, last, parents)
        place[int(last)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise UserError(f"{path}: {'.'.join(parents)} is {place!r} and has no options")


def _child(place: Any, key: str, parents: Sequence[str]) -> Any:
    if isinstance(place, dict):
        return place.get(key)
    if isinstance(place, list):
        if key.isdigit() and int(key) < len(place):
            return place[int(key)]
        raise UserError(f"{'.'.join([*parents, key])}: the list has entries 0 to {len(place) - 1}")
    raise UserError(f"{'.'.join([*parents, key])}: {'.'.join(parents)} is {place!r} and has no options")


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Where two pieces of plain data differ: `train.steps: 100 there, 200 asked for`."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = list(dict.fromkeys([*old, *new]))
        return [
            line for key in keys for line in differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for index, (one, other) in pairs for line in differences(one, other, f"{path}.{index}")]
    return [] if old == new else [f"{path}: {old!r} there, {new!r} asked for"]
