"""Whether two results may be compared, and their figures side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from smalti.core.errors import UserError
from smalti.core.files import read_json

# What must agree: how, in which features, against what, and of how many images (the bias depends on it).
DECIDING = ("protocol", "extractor", "reference")
NOT_DECIDING = {"protocol": ("summary", "metrics", "images", "name"), "reference": ("source", "images")}


class Row(NamedTuple):
    """One figure of both results."""

    name: str
    title: str
    first: float
    second: float
    better: str


def compared(first: Path, second: Path) -> list[Row]:
    """The figures that both results have.

    Raises:
        UserError: they are not comparable (says why), or one is no result.
    """
    one, other = _result(first), _result(second)
    reasons = [reason for key in DECIDING for reason in _differences(key, one[key], other[key])]
    if one["images"]["count"] != other["images"]["count"]:
        reasons.append(f"images.count is {one['images']['count']} and {other['images']['count']}")
    if reasons:
        raise UserError(f"{first} and {second} are not comparable: {'; '.join(reasons)}")
    figures, others = one["figures"], other["figures"]
    return [
        Row(name, figures[name]["title"], figures[name]["value"], others[name]["value"], figures[name]["better"])
        for name in figures
        if name in others
    ]


def _differences(key: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    left_out = NOT_DECIDING.get(key, ())
    return [
        f"{key}.{name} is {one.get(name)!r} and {other.get(name)!r}"
        for name in dict.fromkeys([*one, *other])
        if name not in left_out and one.get(name) != other.get(name)
    ]


def _result(path: Path) -> dict[str, Any]:
    content = read_json(path, "a result of `smalti evaluate images`")
    keys = (*DECIDING, "images", "figures")
    if not isinstance(content, dict) or any(not isinstance(content.get(key), dict) for key in keys):
        raise UserError(f"{path} is no result of `smalti evaluate images`")
    return content
