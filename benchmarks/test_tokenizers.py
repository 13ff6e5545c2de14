"""Published tokenizers beside their plain eager form, in the same run: images of 256 pixels a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import Comparison, Ours
from plain import PlainTiTok, PlainVQGAN
from torch import Tensor

from smalti.core.checkpoints.importing import import_checkpoint
from smalti.core.testing import parity

pytestmark = pytest.mark.benchmark(group="Published tokenizers")
CASES = Path(__file__).parents[1] / "tests" / "parity"
NAMES = {"llamagen-vq-ds16": "LlamaGen VQ-16", "var-vqvae-ch160": "VAR VQVAE"}
BATCH = 4


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def published(name: str) -> tuple[dict[str, Tensor], Any]:
    case = parity.read_case(CASES / f"{name}.json.gz")
    state = parity.fill_state_dict(case["state_dict"], case["weight_seed"])
    return state, import_checkpoint(state)


def images() -> Tensor:
    return parity.fill_input("image", [BATCH, 3, 256, 256], seed=0)


def measure(compare: Comparison, what: str, ours: Callable[[], Tensor], plain: Callable[[], Tensor]) -> None:
    torch.testing.assert_close(ours(), plain(), atol=2e-3, rtol=1e-3)  # the same function of the same weights
    compare([Ours(what, ours, amounts={"images": BATCH})], {"plain eager": plain}, rounds=3)


@pytest.mark.parametrize("case", NAMES)
def test_cnn_encode(compare: Comparison, case: str) -> None:
    state, tokenizer = published(case)
    plain, batch = PlainVQGAN(state, case.partition("-")[0]), images()
    measure(
        compare,
        f"{NAMES[case]}, encoder",
        lambda: tokenizer.to_codes(tokenizer.encoder(batch)).permute(0, 3, 1, 2),
        lambda: plain.encode(batch),
    )


@pytest.mark.parametrize("case", NAMES)
def test_cnn_decode(compare: Comparison, case: str) -> None:
    state, tokenizer = published(case)
    plain = PlainVQGAN(state, case.partition("-")[0])
    latent = parity.fill_input("latent", [BATCH, tokenizer.quantizer.dim, 16, 16], seed=1, kind="normal")
    measure(
        compare,
        f"{NAMES[case]}, decoder",
        lambda: tokenizer.decoder(tokenizer.from_codes(latent.permute(0, 2, 3, 1))),
        lambda: plain.decode(latent),
    )


def test_llamagen_images_to_tokens(compare: Comparison) -> None:
    state, tokenizer = published("llamagen-vq-ds16")
    plain, batch = PlainVQGAN(state, "llamagen"), images()
    measure(
        compare,
        "LlamaGen VQ-16, images to tokens",
        lambda: tokenizer.encode(batch).flatten().double(),
        lambda: plain.tokens(plain.encode(batch)).flatten().double(),
    )


def test_titok_encode(compare: Comparison) -> None:
    state, tokenizer = published("titok-s128")
    plain, batch = PlainTiTok(state, heads=8), images()
    measure(
        compare,
        "TiTok-S-128, encoder",
        lambda: tokenizer.to_codes(tokenizer.encoder(batch)).transpose(1, 2),
        lambda: plain.encode(batch),
    )


def test_titok_decode_to_proxy_codes(compare: Comparison) -> None:
    state, tokenizer = published("titok-s128")
    plain = PlainTiTok(state, heads=8)
    latent = parity.fill_input("latent", [BATCH, 128, 12], seed=1, kind="normal")
    decoder = tokenizer.decoder
    measure(
        compare,
        "TiTok-S-128, decoder to proxy codes",
        lambda: decoder.head.logits(decoder.grid(tokenizer.from_codes(latent))).permute(0, 3, 1, 2),
        lambda: plain.logits(latent),
    )
