"""Changing options by dotted path: `tokenizer.quantizer.codebook_size=1024`."""

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
