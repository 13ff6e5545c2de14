"""An image of VAR-d16 against the original's way of sampling it, on two threads, taken in turns.

The bars are those of float32 and of bfloat16 weights; random weights, top-k 900, top-p 0.96, guidance 1.5.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from comparison import Comparison, Ours
from original_var import sample_var
from plain import PlainVQGAN
from torch import Tensor

from smalti.core.checkpoints.importing import import_checkpoint
from smalti.core.sampling_settings import SamplingSettings
from smalti.core.testing import parity
from smalti.core.tokenizer import ComposedTokenizer
from smalti.generation.var import VAR, VAROptions

pytestmark = pytest.mark.benchmark(group="VAR")
GUIDANCE, TOP_K, TOP_P = 1.5, 900, 0.96
BARS = {"full": 1.8, "bfloat16": 2.8}
Pair = tuple[VAR, ComposedTokenizer, PlainVQGAN]


@pytest.fixture(scope="module")
def pair() -> Pair:
    """The generator, its tokenizer, and the tokenizer's networks written down plainly."""
    case = parity.read_case(Path(__file__).parents[1] / "tests" / "parity" / "var-vqvae-ch160.json.gz")
    state = parity.fill_state_dict(case["state_dict"], case["weight_seed"])
    tokenizer = import_checkpoint(state)
    assert isinstance(tokenizer, ComposedTokenizer)
    torch.manual_seed(0)
    model = VAROptions(gate_start=1.0).build(tokenizer.layout(), 1000)
    model.attach(tokenizer)
    torch.nn.init.normal_(model.output.weight, std=0.1)
    return model.eval(), tokenizer, PlainVQGAN(state, "var")


@pytest.mark.parametrize("batch", [1, 4])
def test_an_image(compare: Comparison, pair: Pair, batch: int) -> None:
    model, tokenizer, plain = pair
    labels = torch.arange(batch)

    # A model keeps one form of packed weights.
    models = {weights: model if weights == "full" else deepcopy(model) for weights in BARS}

    def ours(weights: str, **settings: object) -> tuple[Tensor, Tensor]:
        given = {"guidance_scale": 1 + GUIDANCE, "guidance": "linear", "top_k": TOP_K, "top_p": TOP_P, **settings}
        drawn = models[weights].draw(labels, SamplingSettings(weights=weights, **given))
        with torch.inference_mode(), torch.autocast("cpu", enabled=weights != "full"):
            return drawn.tokens[..., 0], tokenizer.decode_latent(drawn.latent)

    def original(top_k: int = TOP_K) -> tuple[Tensor, Tensor]:
        return sample_var(model, plain, labels, GUIDANCE, top_k, TOP_P)

    tokens, images = ours("full", temperature=0.0)
    expected = original(top_k=1)
    assert torch.equal(tokens, expected[0])
    torch.testing.assert_close(images, expected[1], atol=1e-3, rtol=0)
    work = []
    for weights, bar in BARS.items():
        action = partial(ours, weights)
        action()  # packs the weights
        name = "float32" if weights == "full" else weights
        what = f"VAR-d16, {name} weights, batch {batch}"
        work.append(Ours(what, action, amounts={"images": batch}, bars={"original": bar}))
    compare(work, {"original": original}, rounds=3)
