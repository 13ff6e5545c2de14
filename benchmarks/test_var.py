"""An image of VAR-d16 against the original's way of sampling it, on two threads, taken in turns.

The bars are those of float32 and of bfloat16 weights; random weights, top-k 900, top-p 0.96, guidance 1.5.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from smalti.core.options import Preprocessing
from smalti.core.plugins import registry
from smalti.core.sampling_settings import SamplingSettings
from smalti.core.tokenizer import ComposedTokenizer
from smalti.generation.var import VAR, VAROptions

sys.path.insert(0, str(Path(__file__).parent))

from original_var import sample_var

GUIDANCE, TOP_K, TOP_P = 1.5, 900, 0.96
SIDES = [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]
BARS = {"full": 1.8, "bfloat16": 2.8}
ROUNDS = 3
CNN = {"name": "vqgan", "width": 160, "latent_width": 32}


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pair() -> tuple[VAR, ComposedTokenizer]:
    torch.manual_seed(0)
    unit = {"name": "vq", "dim": 32, "codebook_size": 4096, "initialise": "normal"}
    tokenizer = registry().options("tokenizer", "composed").model_validate({
        "name": "composed",
        "preprocessing": Preprocessing(image_size=256),
        "encoder": {**CNN, "blocks": 1},
        "quantizer": {"name": "multi-scale", "quantizer": unit, "scales": SIDES},
        "decoder": CNN,
        "to_codes": "convolution",
        "from_codes": "convolution",
    }).build().eval()  # fmt: skip
    model = VAROptions(gate_start=1.0).build(tokenizer.layout(), 1000)
    model.attach(tokenizer)
    torch.nn.init.normal_(model.output.weight, std=0.1)
    return model.eval(), tokenizer


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("weights", BARS)
def test_an_image(benchmark: BenchmarkFixture, pair: tuple[VAR, ComposedTokenizer], weights: str, batch: int) -> None:
    model, tokenizer = pair
    labels = torch.arange(batch)

    def ours(**settings: object) -> tuple[Tensor, Tensor]:
        given = {"guidance_scale": 1 + GUIDANCE, "guidance": "linear", "top_k": TOP_K, "top_p": TOP_P, **settings}
        drawn = model.draw(labels, SamplingSettings(weights=weights, **given))
        with torch.inference_mode(), torch.autocast("cpu", enabled=weights != "full"):
            return drawn.tokens[..., 0], tokenizer.decode_latent(drawn.latent)

    def original(top_k: int = TOP_K) -> tuple[Tensor, Tensor]:
        return sample_var(model, tokenizer, labels, GUIDANCE, top_k, TOP_P)

    tokens, images = ours(temperature=0.0)  # also packs the weights
    if weights == "full":
        expected = original(top_k=1)
        assert torch.equal(tokens, expected[0])
        torch.testing.assert_close(images, expected[1], atol=1e-3, rtol=0)
    pairs = []
    for _ in range(ROUNDS):
        tokenizer.decoder.to(memory_format=torch.contiguous_format)
        peer = seconds(original)
        tokenizer.decoder.to(memory_format=torch.channels_last)
        pairs.append((seconds(ours), peer))
    benchmark.pedantic(ours, rounds=1)
    ratio = statistics.median(peer / own for own, peer in pairs)
    benchmark.extra_info["images per second"] = batch / min(own for own, _ in pairs)
    benchmark.extra_info["times as fast as the original"] = ratio
    assert ratio >= BARS[weights]
