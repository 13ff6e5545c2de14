"""Published tokenizers beside their plain eager form, in the same run: images of 256 pixels a second.

`extra_info` gets the images a second of both and `ratio_plain`, the plain form's time over ours; rounds alternate, and
the least time of each counts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from smalti.core.checkpoints.importing import import_checkpoint
from smalti.core.testing import parity

sys.path.insert(0, str(Path(__file__).parent))

from plain import PlainTiTok, PlainVQGAN

CASES = Path(__file__).parents[1] / "tests" / "parity"
BATCH, ROUNDS = 4, 5


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


def published(name: str) -> tuple[dict[str, Tensor], Any]:
    case = parity.read_case(CASES / f"{name}.json.gz")
    state = parity.fill_state_dict(case["state_dict"], case["weight_seed"])
    return state, import_checkpoint(state)


def images() -> Tensor:
    return parity.fill_input("image", [BATCH, 3, 256, 256], seed=0)


def compare(benchmark: BenchmarkFixture, ours: Callable[[], Tensor], plain: Callable[[], Tensor]) -> None:
    torch.testing.assert_close(ours(), plain(), atol=2e-3, rtol=1e-3)  # the same function of the same weights
    taken = [(_seconds(ours), _seconds(plain)) for _ in range(ROUNDS)]
    own, other = map(min, zip(*taken, strict=True))
    benchmark.extra_info.update(ratio_plain=other / own, images_per_second=BATCH / own, plain=BATCH / other)
    benchmark.pedantic(ours, rounds=1)


def _seconds(action: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


@pytest.mark.parametrize("case", ["llamagen-vq-ds16", "var-vqvae-ch160"])
def test_cnn_encode(benchmark: BenchmarkFixture, case: str) -> None:
    state, tokenizer = published(case)
    plain, batch = PlainVQGAN(state, case.partition("-")[0]), images()
    compare(
        benchmark,
        lambda: tokenizer.to_codes(tokenizer.encoder(batch)).permute(0, 3, 1, 2),
        lambda: plain.encode(batch),
    )


@pytest.mark.parametrize("case", ["llamagen-vq-ds16", "var-vqvae-ch160"])
def test_cnn_decode(benchmark: BenchmarkFixture, case: str) -> None:
    state, tokenizer = published(case)
    plain = PlainVQGAN(state, case.partition("-")[0])
    latent = parity.fill_input("latent", [BATCH, tokenizer.quantizer.dim, 16, 16], seed=1, kind="normal")
    compare(
        benchmark,
        lambda: tokenizer.decoder(tokenizer.from_codes(latent.permute(0, 2, 3, 1))),
        lambda: plain.decode(latent),
    )


def test_llamagen_images_to_tokens(benchmark: BenchmarkFixture) -> None:
    state, tokenizer = published("llamagen-vq-ds16")
    plain, batch = PlainVQGAN(state, "llamagen"), images()
    compare(
        benchmark,
        lambda: tokenizer.encode(batch).flatten().double(),
        lambda: plain.tokens(plain.encode(batch)).flatten().double(),
    )


def test_titok_encode(benchmark: BenchmarkFixture) -> None:
    state, tokenizer = published("titok-s128")
    plain, batch = PlainTiTok(state, heads=8), images()
    compare(
        benchmark,
        lambda: tokenizer.to_codes(tokenizer.encoder(batch)).transpose(1, 2),
        lambda: plain.encode(batch),
    )


def test_titok_decode_to_proxy_codes(benchmark: BenchmarkFixture) -> None:
    state, tokenizer = published("titok-s128")
    plain = PlainTiTok(state, heads=8)
    latent = parity.fill_input("latent", [BATCH, 128, 12], seed=1, kind="normal")
    decoder = tokenizer.decoder
    compare(
        benchmark,
        lambda: decoder.head.logits(decoder.grid(tokenizer.from_codes(latent))).permute(0, 3, 1, 2),
        lambda: plain.logits(latent),
    )
