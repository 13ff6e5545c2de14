"""The contract of quantizers, over those composed of others."""

from __future__ import annotations

import pytest
import torch

from smalti.core.testing import QuantizerContract
from smalti.quant.factorized import FactorizedOptions
from smalti.quant.multi_scale import MultiScaleOptions
from smalti.quant.product import ProductOptions
from smalti.quant.projected import ProjectedOptions
from smalti.quant.residual import ResidualOptions
from smalti.quant.rotated import RotatedOptions
from smalti.quant.vector import VectorQuantizerOptions

VQ = VectorQuantizerOptions(dim=4, codebook_size=32, initialise="normal")
EMA = VectorQuantizerOptions(dim=4, codebook_size=32, update="ema", initialise="data", revive_after=1)
COSINE = VectorQuantizerOptions(dim=4, codebook_size=16, cosine=True, unit_length="search", initialise="normal")
SCALES = ((1, 1), (2, 3), (2, 3), (4, 6))


class TestProjected(QuantizerContract):
    options = ProjectedOptions(dim=7, quantizer=VQ, layer_norm=True)


class TestProjectedByCosine(QuantizerContract):
    options = ProjectedOptions(dim=7, quantizer=EMA, cosine=2.0)


class TestRotated(QuantizerContract):
    options = RotatedOptions(quantizer=VQ)


class TestProductOfDifferentUnits(QuantizerContract):
    options = ProductOptions(quantizers=(VQ, EMA, ProjectedOptions(dim=3, quantizer=VQ)))


class TestSharedProduct(QuantizerContract):
    options = ProductOptions(quantizers=(EMA,), branches=3, shared=True)


class TestFactorized(QuantizerContract):
    options = FactorizedOptions(quantizers=(VQ,), branches=3, disentanglement_weight=0.1)


class TestResidual(QuantizerContract):
    options = ResidualOptions(quantizers=(VQ,), depth=3)


class TestResidualWithSharedStatistics(QuantizerContract):
    options = ResidualOptions(quantizers=(EMA,), depth=3, shared=True, level_scale=0.5, clamp=3.0)


class TestResidualWithDropout(QuantizerContract):
    options = ResidualOptions(quantizers=(VQ, EMA, VQ), depth=2, dropout_from=2, gradient="levels", quant_grad_frac=0.5)


class TestResidualByDiveq(QuantizerContract):
    options = ResidualOptions(quantizers=(VQ,), depth=3, gradient="diveq", beams=2, eval_beams=3)


class TestResidualOfProjected(QuantizerContract):
    options = ResidualOptions(quantizers=(ProjectedOptions(dim=6, quantizer=VQ),), depth=2, gradient="levels")


class TestProjectedProductOfResiduals(QuantizerContract):
    options = ProjectedOptions(
        dim=6, quantizer=ProductOptions(quantizers=(ResidualOptions(quantizers=(VQ,), depth=2),), branches=2)
    )
    space = (10,)


class TestMultiScale(QuantizerContract):
    options = MultiScaleOptions(quantizer=COSINE, scales=SCALES, phi=2)


class TestMultiScaleWithSharedStatistics(QuantizerContract):
    options = MultiScaleOptions(
        quantizer=EMA, scales=SCALES, phi=4, enlargement="bilinear", scale_decay=0.8, dropout=0.7, normalise=True
    )


class TestProductOfMultiScale(QuantizerContract):
    options = ProductOptions(
        quantizers=(MultiScaleOptions(quantizer=COSINE, scales=SCALES, phi=1, dropout=0.4, dropout_start=2),),
        branches=2,
    )


@pytest.mark.parametrize("case", [TestSharedProduct, TestResidualWithSharedStatistics, TestProductOfMultiScale])
@pytest.mark.parametrize("training", [False, True])
def test_compiles_to_one_graph(case: type[QuantizerContract], training: bool) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    module, twin = (case.options.build().train(training) for _ in range(2))
    twin.load_state_dict(module.state_dict())
    latent = torch.randn(2, *case.space, module.dim)
    found, expected = torch.compile(module, fullgraph=True, backend="eager")(latent), twin(latent)
    assert torch.equal(found.tokens, expected.tokens)
    torch.testing.assert_close(found.latent, expected.latent)
    torch.testing.assert_close(found.losses, expected.losses)
    torch.testing.assert_close(dict(module.state_dict()), dict(twin.state_dict()))
