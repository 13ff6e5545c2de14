"""The contract of quantizers, over the options of vector quantizers that change what is computed."""

from __future__ import annotations

from smalti.core.testing import QuantizerContract
from smalti.quant.gumbel import GumbelOptions
from smalti.quant.ibq import IndexBackpropagationOptions
from smalti.quant.simvq import SimVQOptions
from smalti.quant.vector import VectorQuantizerOptions


class TestEuclidean(QuantizerContract):
    options = VectorQuantizerOptions(dim=8, codebook_size=32)


class TestCosine(QuantizerContract):
    options = VectorQuantizerOptions(
        dim=8, codebook_size=32, cosine=True, initialise="data", revive_after=1, codebook_weight=0.5
    )


class TestCosineOfCodesOnly(QuantizerContract):
    options = VectorQuantizerOptions(
        dim=8, codebook_size=32, cosine=True, unit_length="codes", entropy_weight=0.1, orthogonal_weight=1.0
    )


class TestCosineOfTheSearchOnly(QuantizerContract):
    options = VectorQuantizerOptions(
        dim=8, codebook_size=32, cosine=True, unit_length="search", estimator="rotation", initialise="normal"
    )


class TestEma(QuantizerContract):
    options = VectorQuantizerOptions(
        dim=8, codebook_size=32, update="ema", ema_decay=0.9, initialise="data", revive_after=1
    )


class TestEmaRevivedByCount(QuantizerContract):
    options = VectorQuantizerOptions(
        dim=8, codebook_size=32, update="ema", ema_decay=0.8, initialise="data", revive_below=2, estimator="rotation"
    )


class TestEmaWithoutSmoothing(QuantizerContract):
    options = VectorQuantizerOptions(dim=8, codebook_size=32, update="ema", ema_smoothing=False, entropy_weight=0.1)


class TestCosineEmaOverSequences(QuantizerContract):
    options = VectorQuantizerOptions(dim=4, codebook_size=100, cosine=True, update="ema", revive_after=2)
    space = (16,)


class TestAffine(QuantizerContract):
    options = VectorQuantizerOptions(dim=8, codebook_size=32, affine=True)


class TestAffineEma(QuantizerContract):
    options = VectorQuantizerOptions(dim=8, codebook_size=32, affine=True, update="ema", revive_after=1)


class TestAnchored(QuantizerContract):
    options = VectorQuantizerOptions(dim=8, codebook_size=32, anchor_decay=0.9)


class TestAnchoredCosineEma(QuantizerContract):
    options = VectorQuantizerOptions(dim=8, codebook_size=32, cosine=True, update="ema", anchor_decay=0.9)


class TestFixedCodes(QuantizerContract):
    options = VectorQuantizerOptions(dim=8, codebook_size=32, update="none", initialise="normal")


class TestDiveq(QuantizerContract):
    options = VectorQuantizerOptions(
        dim=8, codebook_size=32, estimator="diveq", commitment_weight=0, codebook_weight=0, revive_after=1
    )


class TestStochastic(QuantizerContract):
    options = VectorQuantizerOptions(dim=8, codebook_size=32, initialise="normal", stochastic_temperature=0.5)


class TestGumbel(QuantizerContract):
    options = VectorQuantizerOptions(
        dim=8, codebook_size=32, initialise="normal", stochastic_temperature=2.0, estimator="gumbel"
    )


class TestSimVQ(QuantizerContract):
    options = SimVQOptions(dim=8, codebook_size=32)


class TestSimVQWithBiasAndRotation(QuantizerContract):
    options = SimVQOptions(dim=8, codebook_size=32, frozen_dim=5, bias=True, estimator="rotation")


class TestIndexBackpropagation(QuantizerContract):
    options = IndexBackpropagationOptions(dim=8, codebook_size=32)


class TestIndexBackpropagationWithoutEntropy(QuantizerContract):
    options = IndexBackpropagationOptions(dim=8, codebook_size=32, entropy_weight=0)
    space = (16,)


class TestGumbelOfLogits(QuantizerContract):
    options = GumbelOptions(dim=8, codebook_size=32, temperature=0.9)
