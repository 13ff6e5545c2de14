"""Quantizer and usage parts of cases of other families; the families of quantizers are in test_parity_cases.py."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from smalti.core.codebook_health import CodebookHealth
from smalti.quant.vector import VectorQuantizer, VectorQuantizerOptions


def _built(codebook: Tensor, **options: Any) -> VectorQuantizer:
    size, dim = codebook.shape
    quantizer = VectorQuantizerOptions(dim=dim, codebook_size=size, **options).build()
    quantizer.load_state_dict({"codebook": codebook})
    return quantizer


def _first(tensor: Tensor) -> Tensor:
    """Channel-last to channel-first."""
    return tensor.movedim(-1, 1)


def _pair(value: Tensor | float) -> Tensor:
    """Cases store a scalar followed by 0."""
    return torch.tensor([torch.as_tensor(value).item(), 0.0])


def test_llamagen_cosine(parity: ModuleType, load_case: Callable[[str], dict[str, Any]]) -> None:
    case = load_case("llamagen-vq-ds8-quantizer")
    latent, expected = parity.fill_case_inputs(case)["latent"], case["outputs"]
    assert parity.compare(expected["latent"], latent, rtol=1e-5) == []
    quantizer = _built(
        parity.fill_state_dict(case["state_dict"], case["weight_seed"])["quantize.embedding.weight"], cosine=True
    )
    latent = latent.movedim(1, -1)

    quantized = quantizer.eval()(latent)
    assert parity.compare(expected["tokens"], quantized.tokens.flatten()) == []
    assert parity.compare(expected["quantized"], _first(quantized.latent)) == []
    tokens = torch.tensor(expected["tokens"]["values"]).view(1, -1, 1)
    assert parity.compare(expected["quantized"], _first(quantizer.decode(tokens, latent.shape[1:-1]))) == []

    losses = quantizer.train()(latent).losses
    found = torch.stack([losses["codebook"], losses["commitment"], torch.tensor(0.0)])
    assert parity.compare(expected["train_losses"], found) == []


@pytest.mark.parametrize(("queue", "window"), [(None, "all"), (1500, "queue")])
def test_usage_and_perplexity(
    parity: ModuleType, load_case: Callable[[str], dict[str, Any]], queue: int | None, window: str
) -> None:
    case = load_case("vistok-metrics-usage")
    health = CodebookHealth((1024,), queue=queue)
    health.update(parity.fill_case_inputs(case)["tokens"].flatten(1)[:, :, None])
    result = health.result()
    for name in ("usage", "perplexity"):
        assert parity.compare(case["outputs"][f"{name}_{window}"], _pair(result[name][0])) == []
