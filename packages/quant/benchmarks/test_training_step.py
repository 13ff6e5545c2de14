"""A training step, forward and backward, beside vector-quantize-pytorch with the same options, in the same run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from comparison import Comparison, Ours
from torch import Tensor, nn

from smalti.core.contracts import Quantizer
from smalti.quant.fsq import FiniteScalarOptions
from smalti.quant.lfq import LookupFreeOptions
from smalti.quant.residual import ResidualOptions
from smalti.quant.vector import VectorQuantizerOptions

pytestmark = pytest.mark.benchmark(group="Training step of a quantizer")
PEER = "vector-quantize-pytorch"


def _latent(dim: int) -> Tensor:
    """4,096 tokens of 16 images."""
    return torch.randn(16, 256, dim, generator=torch.Generator().manual_seed(0)).requires_grad_()


def _ours(quantizer: Quantizer, latent: Tensor) -> None:
    quantized = quantizer(latent)
    loss = quantized.latent.sum() + sum(quantized.losses.values())
    loss.backward()
    latent.grad = None


def _theirs(module: nn.Module, latent: Tensor) -> None:
    output = module(latent)
    latents = output[0]
    loss = latents.sum() + sum(part.sum() for part in output[2:] if part.is_floating_point())
    loss.backward()
    latent.grad = None


def _compare(
    compare: Comparison, what: str, bar: float, options: Any, module: nn.Module, dim: int, **more: Any
) -> None:
    latent, quantizer = _latent(dim), options.build().train()
    module.train()
    work = Ours(what, lambda: _ours(quantizer, latent), bars={PEER: bar}, **more)
    compare([work], {PEER: lambda: _theirs(module, latent)}, memory_rounds=3)


def _vector(**changes: Any) -> VectorQuantizerOptions:
    """What vector-quantize-pytorch does by default: moving averages, rotation trick."""
    defaults = {"update": "ema", "ema_decay": 0.8, "estimator": "rotation", "commitment_weight": 1.0}
    return VectorQuantizerOptions.model_validate({**defaults, **changes})


def test_vector_16384_x_8_cosine(compare: Comparison, library: Any) -> None:
    module = library.VectorQuantize(dim=8, codebook_size=16384, use_cosine_sim=True)
    _compare(compare, "VQ 16384 x 8, cosine, EMA", 3.0, _vector(dim=8, codebook_size=16384, cosine=True), module, 8)


def test_vector_1024_x_256(compare: Comparison, library: Any) -> None:
    module = library.VectorQuantize(dim=256, codebook_size=1024)
    _compare(compare, "VQ 1024 x 256, EMA", 4.0, _vector(dim=256, codebook_size=1024), module, 256)


def test_residual_8_x_1024(compare: Comparison, library: Any) -> None:
    module = library.ResidualVQ(dim=256, num_quantizers=8, codebook_size=1024)
    unit = _vector(dim=256, codebook_size=1024)
    options = ResidualOptions(quantizers=(unit,), depth=8, gradient="levels")
    _compare(compare, "residual 8 x 1024, width 256", 2.0, options, module, 256)


def test_lookup_free_14_bits_with_entropy(compare: Comparison, library: Any) -> None:
    module = library.LFQ(dim=14, codebook_size=2**14)
    bars = {PEER: 40.0}
    _compare(compare, "LFQ 2^14 with entropy", 100.0, LookupFreeOptions(bits=(14,)), module, 14, memory_bars=bars)


def test_finite_scalar(compare: Comparison, library: Any) -> None:
    levels = (8, 8, 8, 5, 5)
    _compare(compare, "FSQ 8 8 8 5 5", 1.0, FiniteScalarOptions(levels=levels), library.FSQ(list(levels)), 5)
