"""Sampling of RAR and MaskGIT against the original's own way of decoding, guidance on, float32, taken in turns.

The shapes are RAR-B and TiTok's generator for B-64 with a sixth of their blocks, RAR over a quarter of its tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from comparison import Comparison, Ours
from originals_titok import sample_maskgit, sample_rar

from smalti.core.contracts import Generator
from smalti.core.layout import TokenLayout
from smalti.core.sampling_settings import SamplingSettings
from smalti.generation.maskgit import MaskGITOptions
from smalti.generation.rar import RAROptions

pytestmark = pytest.mark.benchmark(group="RAR and MaskGIT")
ROUNDS = 3
BARS = {"rar": {1: 2.0, 8: 1.5}, "maskgit": {1: 1.7, 8: 1.5}}
"""How many times as fast as the original, by batch."""


def built(name: str) -> Generator:
    torch.manual_seed(0)
    if name == "rar":
        model = RAROptions(layers=4).build(TokenLayout.grid(8, 8, (1024,)), classes=1000)
    else:
        model = MaskGITOptions(layers=4).build(TokenLayout.sequence(64, (4096,)), classes=1000)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    return model.eval()


def measure(
    compare: Comparison, what: str, ours: Callable[[], object], original: Callable[[], object], bar: float
) -> None:
    ours()  # packs the weights
    compare([Ours(what, ours, bars={"original": bar})], {"original": original}, rounds=ROUNDS)


@pytest.mark.parametrize("batch", [1, 8])
def test_rar(compare: Comparison, batch: int) -> None:
    model, labels = built("rar"), torch.arange(batch)
    settings = SamplingSettings(guidance_scale=16.0, guidance="power-cosine", guidance_power=2.75)
    length = model.token_layout.positions
    greedy = sample_rar(model, labels, 16.0, 2.75, greedy=True, tokens=16)
    ours = model.sample(labels, settings.model_copy(update={"temperature": 0.0}))
    assert torch.equal(ours[:, :16, 0], greedy)
    measure(
        compare,
        f"RAR, batch {batch}",
        lambda: model.sample(labels, settings),
        lambda: sample_rar(model, labels, 16.0, 2.75, greedy=False, tokens=length),
        BARS["rar"][batch],
    )


@pytest.mark.parametrize("batch", [1, 8])
def test_maskgit(compare: Comparison, batch: int) -> None:
    model, labels = built("maskgit"), torch.arange(batch)
    settings = SamplingSettings(guidance_scale=4.0, guidance="linear", annealing=True, temperature=11.0, steps=8)
    greedy = settings.model_copy(update={"temperature": 0.0})
    assert torch.equal(model.sample(labels, greedy)[:, :, 0], sample_maskgit(model, labels, 4.0, 0.0, 8))
    measure(
        compare,
        f"MaskGIT, batch {batch}",
        lambda: model.sample(labels, settings),
        lambda: sample_maskgit(model, labels, 4.0, 11.0, 8),
        BARS["maskgit"][batch],
    )
