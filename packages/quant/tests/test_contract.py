"""The contract of quantizers, over the options that change what is computed."""

from __future__ import annotations

from smalti.core.testing import QuantizerContract
from smalti.quant.vector import VectorQuantizerOptions


class TestEuclidean(QuantizerContract):
    options = VectorQuantizerOptions(dim=8, codebook_size=32)


class TestCosine(QuantizerContract):
    options = VectorQuantizerOptions(
        dim=8, codebook_size=32, cosine=True, initialise="data", revive_after=1, codebook_weight=0.5
    )


class TestEma(QuantizerContract):
    options = VectorQuantizerOptions(
        dim=8, codebook_size=32, update="ema", ema_decay=0.9, initialise="data", revive_after=1
    )


class TestCosineEmaOverSequences(QuantizerContract):
    options = VectorQuantizerOptions(dim=4, codebook_size=100, cosine=True, update="ema", revive_after=2)
    space = (16,)
