"""How the cases of the transformers related to LlamaGen's are run: SEED-Voken's, and minGPT."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from layouts import imported
from replay import cached_logits
from torch import Tensor

from smalti.core.sampling_settings import SamplingSettings

TRAINING = ("token_drop", "resid_dropout_p", "ffn_dropout_p", "drop_path_rate", "alng")
"""Options of SEED-Voken's transformers that only training sees."""


def _seed_voken(case: dict[str, Any], parity: ModuleType, name: str) -> tuple[Any, dict[str, Any]]:
    """The model, and what of the configuration is still to be compared."""
    config = dict(case["config"])
    left = dict(config.pop("params"))
    assert not config, f"unknown configuration {config}"
    for key in TRAINING:
        left.pop(key, None)
    side = math.isqrt(left["block_size"])
    assert side**2 == left.pop("block_size")
    model = imported(case, parity, name, [f"layout.shape=[[{side}, {side}]]", f"heads={left['n_head']}"])
    assert model.options.heads == left.pop("n_head")
    assert model.classes == left.pop("class_num")
    assert model.options.dim == left.pop("cond_dim")
    return model, left


def run_factorized(case: dict[str, Any], parity: ModuleType) -> Mapping[str, Tensor]:
    model, left = _seed_voken(case, parity, "open-magvit2-gpt")
    left.pop("vocab_size")  # of the published default; the tables' sizes are those of the bits
    assert model.token_layout.vocab == tuple(2**bits for bits in left.pop("factorized_bits"))
    assert (model.options.layers, model.options.inner_layers, model.options.dim) == tuple(
        left.pop(key) for key in ("spatial_n_layer", "factorized_n_layer", "dim")
    )
    assert left.pop("token_factorization") is True
    assert not left, f"unknown configuration {left}"
    if not case["outputs"]:
        return {}
    inputs = parity.fill_case_inputs(case)
    tokens, labels = torch.stack([inputs["pre"], inputs["post"]], dim=-1), inputs["labels"].flatten()
    with torch.inference_mode():
        pre, post = model.logits(tokens, labels)
    cached = dict(zip(("pre", "post"), cached_logits(model, tokens, labels), strict=True))
    found = {"logits_pre": pre, "logits_post": post}
    for stage in case["outputs"]:
        if stage.startswith("cached_"):
            _, stream, step = stage.split("_")
            found[stage] = cached[stream][:, int(step), None]
    return found


def run_ibq(case: dict[str, Any], parity: ModuleType) -> Mapping[str, Tensor]:
    model, left = _seed_voken(case, parity, "ibq-llama")
    assert model.token_layout.vocab == (left.pop("vocab_size"),)
    assert (model.options.layers, model.options.dim) == (left.pop("n_layer"), left.pop("n_embd"))
    assert not left, f"unknown configuration {left}"
    if not case["outputs"]:
        return {}
    inputs = parity.fill_case_inputs(case)
    tokens, labels = inputs["tokens"][:, :, None], inputs["labels"].flatten()
    with torch.inference_mode():
        (logits,) = model.logits(tokens, labels)
    (cached,) = cached_logits(model, tokens, labels)
    steps = [stage for stage in case["outputs"] if stage.startswith("cached_")]
    return {"logits": logits} | {stage: cached[:, int(stage.removeprefix("cached_")), None] for stage in steps}


def run_mingpt(case: dict[str, Any], parity: ModuleType) -> Mapping[str, Tensor]:
    left = dict(case["config"])
    for key in ("embd_pdrop", "resid_pdrop", "attn_pdrop"):  # only training sees them
        left.pop(key)
    assert left.pop("n_unmasked") == 0, "one code stands in front, which sees itself anyhow"
    model = imported(case, parity, "sejal-gpt", [f"heads={left['n_head']}"])
    options = model.options
    assert model.token_layout.shape == ((left.pop("block_size"),),)
    assert model.token_layout.vocab == (left.pop("vocab_size"),)
    assert (options.layers, options.heads, options.dim) == tuple(
        left.pop(key) for key in ("n_layer", "n_head", "n_embd")
    )
    assert not left, f"unknown configuration {left}"
    if not case["outputs"]:
        return {}
    sequence = parity.fill_case_inputs(case)["tokens"]
    # The first token stands in front; the last of what follows is never read.
    following = torch.cat([sequence[:, 1:], sequence[:, :1]], dim=1)[:, :, None]
    with torch.inference_mode():
        (logits,) = model.logits(following, sequence[:, 0])
    greedy = model.sample(sequence[:, 0], SamplingSettings(temperature=0))[:, :, 0]
    steps = case["outputs"].get("greedy", {"shape": [0, 0]})["shape"][1]
    return {"logits": logits, "greedy": greedy[:, :steps]}


RUNNERS = {
    "quant-openmagvit2-factorized-gpt": run_factorized,
    "quant-ibq-llama": run_ibq,
    "sejal1d-gpt-": run_mingpt,
}
