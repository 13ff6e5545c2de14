"""Sampling against the originals' own way of decoding, guidance on, in float32, taken in turns.

The shapes are GPT-B and a FAR of its width; figures are tokens per second.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch
from comparison import Comparison, Ours
from originals import sample_ar, sample_far
from torch import Tensor

from smalti.core.contracts import Generator
from smalti.core.layout import TokenLayout
from smalti.core.sampling_settings import SamplingSettings
from smalti.generation.ar import AROptions
from smalti.generation.far import FAROptions

pytestmark = pytest.mark.benchmark(group="AR and FAR")
SCALE = 2.0
ROUNDS = 3
BARS = {"ar": {1: 4.0, 8: 3.0}, "far": {1: 3.0, 8: 3.0}}
"""How many times as fast as the original, by batch."""


def built(name: str) -> Generator:
    torch.manual_seed(0)
    if name == "ar":
        model = AROptions().build(TokenLayout.grid(16, 16, (16384,)), classes=1000)
    else:
        options = FAROptions(layers=12, dim=768, heads=12)
        model = options.build(TokenLayout.grid(8, 16, (16384, 16384)), classes=1000)
    for output in model.outputs:
        torch.nn.init.normal_(output.weight, std=0.2)
    return model.eval()


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("name", ["ar", "far"])
def test_decoding(compare: Comparison, name: str, batch: int) -> None:
    model, original = built(name), {"ar": sample_ar, "far": sample_far}[name]
    labels, positions = torch.arange(batch), model.token_layout.positions

    def ours(model: Generator = model, **settings: object) -> Tensor:
        return model.sample(labels, SamplingSettings(guidance_scale=SCALE, **settings))

    greedy = original(model, labels, SCALE, 16, greedy=True).view(batch, 16, -1)
    assert torch.equal(ours(temperature=0)[:, :16], greedy)
    tokens = {"tokens": batch * positions * model.token_layout.streams}
    what = f"{name.upper()}, batch {batch}"
    work = [Ours(what, ours, amounts=tokens, bars={"original": BARS[name][batch]})]
    for weights in ("bfloat16", "int8"):
        packed = partial(ours, deepcopy(model), weights=weights)  # a model keeps one form of packed weights
        packed()
        work.append(Ours(f"{what}, {weights} weights", packed, amounts=tokens))
    compare(work, {"original": lambda: original(model, labels, SCALE, positions, greedy=False)}, rounds=ROUNDS)
