from typing import Annotated, Literal

import pytest
from pydantic import ValidationError

from smalti.core.options import Options, QuantizerOptions, Slot, sentences


class Holder(Options):
    quantizer: Annotated[QuantizerOptions, Slot("quantizer", "signs")]
    mode: Literal["a", "b"] = "a"


def told(content) -> str:
    with pytest.raises(ValidationError) as caught:
        Holder.model_validate(content)
    return sentences(caught.value)


def test_a_slot_takes_a_mapping_a_name_or_options():
    chosen = Holder.model_validate({"quantizer": {"name": "signs", "dim": 3}})
    assert chosen.quantizer.dim == 3
    assert Holder.model_validate({"quantizer": "signs"}).quantizer.dim == 4
    assert Holder.model_validate({"quantizer": {"dim": 2}}).quantizer.dim == 2
    assert Holder.model_validate({"quantizer": chosen.quantizer}) == chosen
    assert Holder.model_validate(chosen.model_dump(mode="json")) == chosen
    assert chosen.model_dump(mode="json") == {"quantizer": {"name": "signs", "dim": 3}, "mode": "a"}


def test_errors_give_the_dotted_path_and_what_is_right():
    assert told({"quantizer": {"name": "signs", "dims": 3}}) == "quantizer.dims: no such option"
    assert told({"quantizer": {"dim": 0}}) == "quantizer.dim: Input should be greater than or equal to 1, got 0"
    assert told({"quantizer": {"dim": "x"}}).startswith("quantizer.dim: Input should be a valid integer")
    assert told({"quantizer": {"name": "fsqq"}}) == "quantizer: unknown quantizer 'fsqq'; installed: signs"
    assert told({"quantizer": 3}) == "quantizer: expected {name: ..., options}, got 3"
    assert told({"quantizer": "signs", "mode": "c"}) == "mode: Input should be 'a' or 'b', got 'c'"
    assert told({}) == "quantizer: Field required"
    assert told({"quantizer": {"dim": 0}, "mood": 1}).count(";") == 1


def test_a_slot_without_default_needs_a_name():
    class Bare(Options):
        quantizer: Annotated[QuantizerOptions, Slot("quantizer")]

    with pytest.raises(ValidationError) as caught:
        Bare.model_validate({"quantizer": {"dim": 3}})
    assert sentences(caught.value) == "quantizer: a quantizer needs a name; installed: signs"
