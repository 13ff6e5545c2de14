"""How tokens are drawn; imported by recipes, so without torch."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, WrapValidator

from smalti.core.errors import UserError
from smalti.core.options import Options

NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]


def _one_or_each(kind: Any) -> WrapValidator:
    """One value of a kind, or a list of them; a union would complain of what was not meant, too."""
    one, each = TypeAdapter(kind), TypeAdapter(tuple[kind, ...])
    return WrapValidator(
        lambda value, _union: (each if isinstance(value, list | tuple) else one).validate_python(value)
    )


PER_STREAM = ("guidance_scale", "temperature", "top_k", "top_p")
"""The settings that may be lists with one value per stream of the tokens."""


class SamplingSettings(Options):
    """How tokens are drawn from a generator's distributions.

    `guidance_scale`, `temperature`, `top_k` and `top_p` are one value, or a list with one for each stream.

    Args:
        guidance_scale: classifier-free guidance w (Ho and Salimans 2022, LlamaGen's convention): logits =
            unconditional + w (conditional - unconditional). 1 turns it off.
        guidance: how the weight moves over the sampling, with t from 0 at its first step towards 1: `constant` is w;
            `linear` is 1 + (w - 1) t (VAR over its scales, MaskGIT); `power-cosine` is
            1 + (w - 1) (1 - cos(pi t^power)) / 2 (RAR).
        guidance_power: of `power-cosine`.
        guidance_steps: guide only that many steps from the first; 0 guides all.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keeps the k most likely tokens (ties survive); 0 keeps all.
        top_p: then keeps the most likely tokens up to this share of the probability, at least one.
        steps: of generators that draw many tokens at once (MaskGIT); 0 is as many as their options say.
        annealing: of the same: divides the logits by 0.5 + 0.8 r, with r the share of steps to come (TiTok).
        seed: of the noise. Sample i draws the same noise whatever the batch, the processes, or a restart.
        weights: what the linear layers compute with on a CPU: `full`, the weights as they are; `bfloat16` or `int8`,
            less memory to read per token, at the price of slightly other logits.
    """

    guidance_scale: Annotated[float | tuple[float, ...], _one_or_each(NonNegative)] = 1.0
    guidance: Literal["constant", "linear", "power-cosine"] = "constant"
    guidance_power: NonNegative = 1.0
    guidance_steps: Count = 0
    temperature: Annotated[float | tuple[float, ...], _one_or_each(NonNegative)] = 1.0
    top_k: Annotated[int | tuple[int, ...], _one_or_each(Count)] = 0
    top_p: Annotated[float | tuple[float, ...], _one_or_each(Share)] = 1.0
    steps: Count = 0
    annealing: bool = False
    seed: Count = 0
    weights: Literal["full", "bfloat16", "int8"] = "full"

    def per_stream(self, streams: int) -> tuple[SamplingSettings, ...]:
        """The settings of each of `streams` streams, every one with single values.

        Raises:
            UserError: a list of another length.
        """
        lists = {name: value for name in PER_STREAM if isinstance(value := getattr(self, name), tuple)}
        for name, values in lists.items():
            if len(values) != streams:
                raise UserError(f"{name} lists {len(values)} values, but the tokens have {streams} streams")
        return tuple(
            self.model_copy(update={name: values[stream] for name, values in lists.items()})
            for stream in range(streams)
        )

    @property
    def guides(self) -> bool:
        """Whether there is any guidance."""
        scale = self.guidance_scale
        return any(value != 1 for value in (scale if isinstance(scale, tuple) else (scale,)))

    def guidance_weight(self, step: int, progress: float) -> float:
        """The weight w at a step, for settings of one stream.

        Args:
            step: 0 at the beginning.
            progress: t, from 0 at the first step towards 1.
        """
        assert not isinstance(self.guidance_scale, tuple), "the settings of one stream are needed"
        if self.guidance_steps and step >= self.guidance_steps:
            return 1.0
        strength = {
            "constant": 1.0,
            "linear": progress,
            "power-cosine": (1 - math.cos(math.pi * progress**self.guidance_power)) / 2,
        }[self.guidance]
        # The constant weight as it was given: adding and subtracting 1 would round it.
        return self.guidance_scale if strength == 1 else 1 + (self.guidance_scale - 1) * strength
