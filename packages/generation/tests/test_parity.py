"""AR against what LlamaGen's own code computes with the same weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.core.layout import TokenLayout
from smalti.core.sampling_settings import SamplingSettings
from smalti.core.testing.parity import compare, fill_case_inputs, fill_state_dict
from smalti.generation.ar import AR, AROptions
from smalti.generation.rotary import rotary_table
from smalti.generation.sampling import at_temperature, guided, top_k, top_p

RENAMED = {
    "cls_embedding.embedding_table": "class_embedding",
    "tok_embeddings": "token_embedding",
    "layers": "transformer.blocks",
    "attention.wqkv": "attention.qkv",
    "attention.wo": "attention.out",
    "feed_forward.w1": "ffn.gate",
    "feed_forward.w3": "ffn.up",
    "feed_forward.w2": "ffn.down",
}


def our_name(published: str) -> str:
    for theirs, ours in RENAMED.items():
        published = published.replace(theirs, ours)
    return published


@pytest.fixture(
    scope="module", params=["llamagen-gpt-small", pytest.param("llamagen-gpt-b-256", marks=pytest.mark.slow)]
)
def case(request: pytest.FixtureRequest, load_case: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return load_case(request.param)


@pytest.fixture(scope="module")
def model(case: dict[str, Any]) -> AR:
    config = case["config"]
    side = math.isqrt(config["block_size"])
    options = AROptions(
        layers=config["n_layer"], dim=config["dim"], heads=config["n_head"], ffn_multiple=config["multiple_of"]
    )
    assert options.ffn_dim == config["ffn_hidden"]
    with torch.device("meta"):
        model = options.build(TokenLayout.grid(side, side, (config["vocab_size"],)), config["num_classes"])
    weights = fill_state_dict(case["state_dict"], case["weight_seed"])
    model.load_state_dict({our_name(key): weight for key, weight in weights.items()}, assign=True)
    return model.eval()


@pytest.fixture(scope="module")
def inputs(case: dict[str, Any]) -> dict[str, Tensor]:
    inputs = fill_case_inputs(case)
    inputs["labels"][-1] = case["config"]["num_classes"]
    return inputs


@pytest.fixture(scope="module")
def logits(model: AR, inputs: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        return model.logits(inputs["tokens"][:, :, None], inputs["labels"])


def decoded(model: AR, labels: Tensor, scales: list[float]) -> Tensor:
    """Greedy tokens with the cache, guided by one scale per step; 1 takes the conditional logits as they are."""
    rows = torch.cat([labels, torch.full_like(labels, model.classes)])
    cache = model.transformer.new_cache(len(rows), len(scales))
    rotary = rotary_table(model.token_layout, model.options.head_dim)
    inputs = model.class_embedding(rows)
    tokens = []
    for step, scale in enumerate(scales):
        logits = model.predict(inputs[:, None], rotary[step : step + 1], cache)[:, 0]
        tokens.append((logits[: len(labels)] if scale == 1 else guided(logits, scale)).argmax(-1))
        inputs = model.token_embedding(tokens[-1].repeat(2))
    return torch.stack(tokens, dim=1)


def test_rotary_table(case: dict[str, Any], model: AR) -> None:
    table = torch.view_as_real(rotary_table(model.token_layout, model.options.head_dim))
    assert compare(case["outputs"]["rope_table"], table) == []


def test_training_logits(case: dict[str, Any], logits: Tensor) -> None:
    assert compare(case["outputs"]["logits"], logits) == []


def test_losses(case: dict[str, Any], model: AR, inputs: dict[str, Tensor], logits: Tensor) -> None:
    per_token = F.cross_entropy(logits.transpose(1, 2), inputs["tokens"], reduction="none")
    assert compare(case["outputs"]["token_nll"], per_token) == []
    # The loss takes no null label, so only the first image can be asked for.
    first = model.loss(inputs["tokens"][:1, :, None], inputs["labels"][:1])["cross_entropy"]
    torch.testing.assert_close(first, per_token[0].mean())


@torch.inference_mode()
def test_cached_logits_are_the_training_logits(
    case: dict[str, Any], model: AR, inputs: dict[str, Tensor], logits: Tensor
) -> None:
    steps = case["config"]["sampling"]["new_tokens"]
    cache = model.transformer.new_cache(len(inputs["labels"]), steps)
    rotary = rotary_table(model.token_layout, model.options.head_dim)
    embedded = model.class_embedding(inputs["labels"])
    cached = []
    for step in range(steps):
        cached.append(model.predict(embedded[:, None], rotary[step : step + 1], cache))
        embedded = model.token_embedding(inputs["tokens"][:, step])
    torch.testing.assert_close(torch.cat(cached, dim=1), logits[:, :steps], rtol=0, atol=1e-4)


@torch.inference_mode()
def test_greedy_tokens(case: dict[str, Any], model: AR, inputs: dict[str, Tensor]) -> None:
    sampling, labels = case["config"]["sampling"], inputs["sample_labels"]
    steps, scale = sampling["new_tokens"], sampling["cfg_scale"]
    scales = {"greedy_cfg": [scale] * steps, "greedy_no_cfg": [1.0] * steps}
    if "cfg_interval" in sampling:
        guided_steps = 1 + sampling["cfg_interval"] + 1  # the prefill, then decode steps up to the interval
        scales["greedy_cfg_interval"] = [scale] * guided_steps + [1.0] * (steps - guided_steps)
    stages = [stage for stage in case["outputs"] if stage.startswith("greedy")]
    assert stages
    for stage in stages:
        assert compare(case["outputs"][stage], decoded(model, labels, scales[stage])) == [], stage


def test_sample_gives_the_greedy_tokens(case: dict[str, Any], model: AR, inputs: dict[str, Tensor]) -> None:
    sampling = case["config"]["sampling"]
    if sampling["new_tokens"] < model.token_layout.positions:
        return  # only the beginning is stored; `test_greedy_tokens` compares it
    for stage, scale in {"greedy_cfg": sampling["cfg_scale"], "greedy_no_cfg": 1.0}.items():
        tokens = model.sample(inputs["sample_labels"], SamplingSettings(temperature=0, guidance_scale=scale))
        assert compare(case["outputs"][stage], tokens[:, :, 0]) == [], stage


def test_filters(load_case: Callable[[str], dict[str, Any]], case: dict[str, Any], logits: Tensor) -> None:
    if "kept" not in case["outputs"]:
        return  # a stage of the small case only
    sampling, expected = case["config"]["sampling"], case["outputs"]["kept"]
    filtered = at_temperature(guided(logits.flatten(0, 1), sampling["cfg_scale"]), sampling["filter_temperature"])
    filtered = top_k(filtered, sampling["filter_top_k"])
    filtered = top_p(filtered, sampling["filter_top_p"], among=sampling["filter_top_k"])
    kept = torch.tensor(expected["values"]).reshape(expected["shape"]).bool()
    assert torch.equal(filtered.isfinite(), kept)
