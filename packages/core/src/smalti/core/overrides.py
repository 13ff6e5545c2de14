"""Options as plain data: changing them by dotted path, `tokenizer.quantizer.codebook_size=1024`, and comparing them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from smalti.core.errors import UserError
from smalti.core.files import parse_yaml


def apply_override(content: dict[str, Any], override: str) -> None:
    """Set one dotted path of plain data in place; list entries by number.

    Args:
        content: the data; what lies deeper in it is replaced by changed copies, since YAML's aliases may share it.
        override: `dotted.path=value`, the value as YAML.

    Raises:
        UserError: no path, no value, or a path that leads through something without options.
    """
    path, equals, text = override.partition("=")
    *parents, last = path.split(".")
    if not equals or not all([*parents, last]):
        raise UserError(f"{override!r} is not an override: expected dotted.path=value")
    try:
        value = parse_yaml(text)
    except ValueError:
        raise UserError(f"{path}: {text!r} is not a YAML value") from None
    place: Any = content
    for depth, key in enumerate(parents):
        child = _child(place, key, parents[:depth])
        if child is None:
            child = {}
        elif isinstance(child, str):  # a component given by its bare name
            child = {"name": child}
        changed = copy.copy(child)
        place[_index(place, key)] = changed
        place = changed
    _child(place, last, parents)
    place[_index(place, last)] = value


def _index(place: dict[str, Any] | list[Any], key: str) -> str | int:
    return int(key) if isinstance(place, list) else key


def _child(place: Any, key: str, parents: Sequence[str]) -> Any:
    path = ".".join([*parents, key])
    if isinstance(place, dict):
        return place.get(key)
    if not isinstance(place, list):
        raise UserError(f"{path}: {'.'.join(parents)} is {place!r} and has no options")
    if not place:
        raise UserError(f"{path}: the list is empty")
    if not key.isdecimal() or int(key) >= len(place):
        raise UserError(f"{path}: the list has entries 0 to {len(place) - 1}")
    return place[int(key)]


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
