"""How tokens are drawn; imported by recipes, so without torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from smalti.core.options import Options


class SamplingSettings(Options):
    """How tokens are drawn from a generator's distributions.

    Args:
        guidance_scale: classifier-free guidance w (Ho and Salimans 2022, LlamaGen's convention): logits =
            unconditional + w (conditional - unconditional). 1 turns it off.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keeps the k most likely tokens (ties survive); 0 keeps all.
        top_p: then keeps the most likely tokens up to this share of the probability, at least one.
        seed: of the noise. Sample i draws the same noise whatever the batch, the processes, or a restart.
    """

    guidance_scale: Annotated[float, Field(ge=0)] = 1.0
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=0)] = 0
