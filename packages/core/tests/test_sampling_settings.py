"""Settings of sampling: one value, or one per stream, and guidance over the steps."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from smalti.core.errors import UserError
from smalti.core.options import sentences
from smalti.core.sampling_settings import SamplingSettings


def test_lists_are_handed_out_to_the_streams() -> None:
    settings = SamplingSettings(guidance_scale=[1, 2.5], top_k=[0, 9], temperature=0.5, seed=3)
    first, second = settings.per_stream(2)
    assert first == SamplingSettings(guidance_scale=1.0, top_k=0, temperature=0.5, seed=3)
    assert second == SamplingSettings(guidance_scale=2.5, top_k=9, temperature=0.5, seed=3)


def test_one_value_is_for_all_streams() -> None:
    settings = SamplingSettings(guidance_scale=2.0)
    assert settings.per_stream(3) == (settings, settings, settings)


def test_another_number_of_streams_is_told() -> None:
    with pytest.raises(UserError) as raised:
        SamplingSettings(top_p=[0.5, 0.6]).per_stream(3)
    assert str(raised.value) == "top_p lists 2 values, but the tokens have 3 streams"


@pytest.mark.parametrize(
    ("chosen", "sentence"),
    [
        ({"top_p": 2}, "top_p: Input should be less than or equal to 1, got 2"),
        ({"temperature": [1, -1]}, "temperature.1: Input should be greater than or equal to 0, got -1"),
        ({"top_k": 1.5}, "top_k: Input should be a valid integer, got a number with a fractional part, got 1.5"),
    ],
)
def test_a_wrong_value_is_told_with_its_place(chosen: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValidationError) as raised:
        SamplingSettings(**chosen)
    assert sentences(raised.value) == sentence


@pytest.mark.parametrize(("scale", "guides"), [(1.0, False), (1.5, True), (0.0, True), ((1, 1), False), ((1, 2), True)])
def test_guidance_of_1_is_none(scale: float | tuple[float, ...], guides: bool) -> None:
    assert SamplingSettings(guidance_scale=scale).guides == guides


def test_settings_come_back_from_plain_data() -> None:
    settings = SamplingSettings(guidance_scale=(1.5, 2.0), guidance="linear", top_k=[3, 4])
    assert SamplingSettings.model_validate(settings.model_dump(mode="json")) == settings
