"""The numbers of the original systems, from weights and inputs that seeds determine."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from smalti.quant.ema import EmaStatistics
from smalti.quant.health import CodebookHealth
from smalti.quant.lookup import nearest_code
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


@pytest.mark.parametrize(
    ("name", "key", "gradient"),
    [
        ("quant-vistok-vq", "codebook.weight", "grad_codebook_weight"),
        ("quant-taming-vq2-fixed", "embedding.weight", "grad_embedding"),
    ],
)
def test_euclidean(parity: ModuleType, name: str, key: str, gradient: str) -> None:
    case = parity.load_case(name)
    inputs, expected = parity.inputs(case), case["outputs"]
    quantizer = _built(parity.weight(case, key)).train()
    latent = inputs["latent"].movedim(1, -1).requires_grad_()
    quantized = quantizer(latent)
    total = sum(quantized.losses.values())
    ((_first(quantized.latent) * inputs["probe"]).sum() + total).backward()

    found = {
        "quantized": _first(quantized.latent),
        "indices": quantized.tokens.view(latent.shape[:-1]),
        "grad_latent": _first(latent.grad),
        gradient: quantizer.codebook.grad,
        "quant_loss": _pair(total),
        "loss_commit": _pair(quantized.losses["commitment"] / 0.25),
        "loss_vq": _pair(quantized.losses["codebook"]),
    }
    assert len(expected.keys() & found.keys()) == len(expected.keys() - {"perplexity"})
    for stage in expected.keys() & found.keys():
        assert parity.compare(expected[stage], found[stage]) == [], stage


def test_llamagen_cosine(parity: ModuleType) -> None:
    case = parity.load_case("llamagen-vq-ds8-quantizer")
    latent, expected = parity.inputs(case)["latent"], case["outputs"]
    assert parity.compare(expected["latent"], latent, rtol=1e-5) == []
    quantizer = _built(parity.weight(case, "quantize.embedding.weight"), cosine=True)
    latent = latent.movedim(1, -1)

    quantized = quantizer.eval()(latent)
    assert parity.compare(expected["tokens"], quantized.tokens.flatten()) == []
    assert parity.compare(expected["quantized"], _first(quantized.latent)) == []
    tokens = torch.tensor(expected["tokens"]["values"]).view(1, -1, 1)
    assert parity.compare(expected["quantized"], _first(quantizer.decode(tokens, latent.shape[1:-1]))) == []

    losses = quantizer.train()(latent).losses
    found = torch.stack([losses["codebook"], losses["commitment"], torch.tensor(0.0)])
    assert parity.compare(expected["train_losses"], found) == []


def test_ema_with_laplace_smoothing(parity: ModuleType) -> None:
    case = parity.load_case("quant-taming-embedding-ema")
    inputs, expected = parity.inputs(case), case["outputs"]
    tokens = nearest_code(inputs["latent"], inputs["weight"])
    statistics = EmaStatistics(inputs["weight"], decay=0.99)
    codebook = statistics.update(tokens, inputs["latent"])
    assert parity.compare(expected["indices"], tokens) == []
    assert parity.compare(expected["cluster_size"], statistics.counts) == []
    assert parity.compare(expected["embed_avg"], statistics.sums) == []
    assert parity.compare(expected["weight_after"], codebook) == []


@pytest.mark.parametrize(("queue", "window"), [(None, "all"), (1500, "queue")])
def test_usage_and_perplexity(parity: ModuleType, queue: int | None, window: str) -> None:
    case = parity.load_case("vistok-metrics-usage")
    health = CodebookHealth((1024,), queue=queue)
    health.update(parity.inputs(case)["tokens"].flatten(1)[:, :, None])
    result = health.result()
    for name in ("usage", "perplexity"):
        assert parity.compare(case["outputs"][f"{name}_{window}"], _pair(result[name][0])) == []
