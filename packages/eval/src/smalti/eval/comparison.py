"""Whether two results may be compared, and their figures side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from smalti.core.errors import UserError, few
from smalti.core.files import read_json
from smalti.core.options import sentences

# What must agree: how, in which features, against what, and of how many images (the bias depends on it).
DECIDING = ("protocol", "extractor", "reference")
NOT_DECIDING = {"protocol": ("summary", "metrics", "images", "name"), "reference": ("source", "images")}
# Of what a stranger's file says a sentence repeats so much.
LETTERS, REASONS = 80, 6


class Row(NamedTuple):
    """One figure of both results."""

    name: str
    title: str
    first: float
    second: float
    better: str


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("expected printable text")
    return text


class _Told(BaseModel):
    """What a comparison looks at in a result; all else is passed over, so that results of other versions are read."""

    model_config = ConfigDict(strict=True)


class _Figure(_Told):
    title: Annotated[str, Field(max_length=LETTERS), AfterValidator(_printable)]
    value: float
    better: Literal["higher", "lower"]


class _Images(_Told):
    count: Annotated[int, Field(ge=0, lt=1 << 63)]


class _Result(_Told):
    protocol: dict[str, Any]
    extractor: dict[str, Any]
    reference: dict[str, Any]
    images: _Images
    figures: dict[str, _Figure]


def compared(first: Path, second: Path) -> list[Row]:
    """The figures that both results have.

    Raises:
        UserError: they are not comparable (says why), or one is missing, damaged or no result.
    """
    one, other = _result(first), _result(second)
    reasons = [reason for key in DECIDING for reason in _differences(key, getattr(one, key), getattr(other, key))]
    if one.images.count != other.images.count:
        reasons.append(f"images.count is {one.images.count} and {other.images.count}")
    if reasons:
        raise UserError(f"{first} and {second} are not comparable: {few(reasons, REASONS, between='; ')}")
    return [
        Row(name, figure.title, figure.value, other.figures[name].value, figure.better)
        for name, figure in one.figures.items()
        if name in other.figures
    ]


def _differences(key: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    left_out = NOT_DECIDING.get(key, ())
    return [
        f"{key}.{name[:LETTERS]} is {_shown(one.get(name))} and {_shown(other.get(name))}"
        for name in dict.fromkeys([*one, *other])
        if name not in left_out and one.get(name) != other.get(name)
    ]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= LETTERS else f"{text[: LETTERS - 3]}..."


def _result(path: Path) -> _Result:
    content = read_json(path, "a result of `smalti evaluate images`")
    try:
        return _Result.model_validate(content)
    except ValidationError as error:
        raise UserError(
            f"{path} is no result of `smalti evaluate images`: {sentences(error)[: REASONS * LETTERS]}"
        ) from None
