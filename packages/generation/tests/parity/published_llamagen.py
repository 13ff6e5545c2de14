"""How the cases of LlamaGen's transformers and of FAR are run on ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from layouts import imported
from torch import Tensor

from smalti.core.sampling_settings import SamplingSettings
from smalti.generation.rotary import rotary_table
from smalti.generation.sampling import at_temperature, guided, top_k, top_p

UNUSED = {"n_kv_head": None, "ffn_dim_multiplier": None}
"""Options of the original that no model sets."""


def _overrides(left: dict[str, Any], new_tokens: int | None) -> list[str]:
    """What the weights do not tell; takes it out of the configuration."""
    side = math.isqrt(left["block_size"])
    assert side**2 == left.pop("block_size")
    # A grid of fewer rows has the same first tokens.
    rows = side if new_tokens is None else -(-new_tokens // side)
    for key, value in UNUSED.items():
        assert left.pop(key) == value
    return [
        f"layout.shape=[[{rows}, {side}]]",
        f"heads={left['n_head']}",
        f"rotary_base={left.pop('rope_base')}",
        f"norm_eps={left.pop('norm_eps')}",
        f"label_dropout={left.pop('class_dropout_prob')}",
    ]


def _check(options: Any, left: dict[str, Any]) -> None:
    assert (options.layers, options.heads, options.dim) == tuple(left.pop(key) for key in ("n_layer", "n_head", "dim"))
    width = -(-(8 * options.dim // 3) // left["multiple_of"]) * left.pop("multiple_of")
    assert options.ffn_dim == left.pop("ffn_hidden") == width


def _greedy(sampling: dict[str, Any], **settings: Any) -> SamplingSettings:
    return SamplingSettings(temperature=0, **{"guidance_scale": sampling["cfg_scale"], **settings})


def run_gpt(case: dict[str, Any], parity: ModuleType) -> Mapping[str, Tensor]:
    left = dict(case["config"])
    sampling = dict(left.pop("sampling", {}))
    assert left.pop("family") == "gpt"
    text = {"t2i": True, "c2i": False}[left.pop("model_type")]
    name = "llamagen-gpt-t2i" if text else "llamagen-gpt"
    whole, short = (_overrides(dict(left), steps) for steps in (None, sampling.get("new_tokens")))
    for key in (*UNUSED, "block_size", "rope_base", "norm_eps", "class_dropout_prob"):
        left.pop(key)
    model = imported(case, parity, name, whole)
    _check(model.options, left)
    assert model.token_layout.vocab == (left.pop("vocab_size"),)
    prefix, width, classes = (left.pop(key) for key in ("cls_token_num", "caption_dim", "num_classes"))
    lengths = left.pop("caption_lengths", None)
    null_last = left.pop("last_label_is_null", False)
    assert not left, f"unknown configuration {left}"
    if text:
        assert (model.options.captions.length, model.options.captions.width) == (prefix, width)
    else:
        assert (prefix, classes) == (1, model.classes)
    if not case["outputs"]:
        return {}
    inputs = parity.fill_case_inputs(case)
    found = {"rope_table": torch.view_as_real(rotary_table(model.token_layout, model.options.head_dim))}
    if text:
        for caption, length in zip(inputs["caption"], lengths, strict=True):
            caption[: prefix - length] = 0
        labels = sample_labels = inputs["caption"]
    else:
        labels, sample_labels = inputs["labels"], inputs["sample_labels"]
        if null_last:
            labels[-1] = classes
    with torch.inference_mode():
        (logits,) = model.logits(inputs["tokens"][:, :, None], labels)
    found["logits"] = logits
    found["token_nll"] = F.cross_entropy(logits.transpose(1, 2), inputs["tokens"], reduction="none")
    settings = {"greedy_cfg": _greedy(sampling), "greedy_no_cfg": _greedy(sampling, guidance_scale=1.0)}
    if "cfg_interval" in sampling:
        # the prefill, and then decode steps 0 to cfg_interval
        settings["greedy_cfg_interval"] = _greedy(sampling, guidance_steps=sampling.pop("cfg_interval") + 2)
    shorter = imported(case, parity, name, short)
    steps, scale = sampling.pop("new_tokens"), sampling.pop("cfg_scale")
    for stage in settings.keys() & case["outputs"].keys():
        found[stage] = shorter.sample(sample_labels, settings[stage])[:, :steps, 0]
    if "kept" in case["outputs"]:
        filtered = at_temperature(guided(logits.flatten(0, 1), scale), sampling.pop("filter_temperature"))
        k, p = sampling.pop("filter_top_k"), sampling.pop("filter_top_p")
        found["kept"] = top_p(top_k(filtered, k), p, among=k).isfinite().long()
    sampling.pop("temperature")  # of the drawn tokens that no stage has
    assert not sampling, f"unknown settings {sampling}"
    return found


def run_far(case: dict[str, Any], parity: ModuleType) -> Mapping[str, Tensor]:
    left = dict(case["config"])
    sampling = dict(left.pop("sampling", {}))
    assert left.pop("family") == "far"
    assert left.pop("model_type") == "c2i"
    model = imported(case, parity, "far", _overrides(left, None))
    _check(model.options, left)
    codes = left.pop("codes")
    assert len(left.pop("code_order")) == codes
    assert model.token_layout.vocab == (left.pop("vocab_size"),) * codes
    assert model.options.inner_layers == left.pop("ar_n_layer")
    assert (left.pop("cls_token_num"), left["num_classes"]) == (1, model.classes)
    classes, null_last = left.pop("num_classes"), left.pop("last_label_is_null", False)
    assert not left, f"unknown configuration {left}"
    if not case["outputs"]:
        return {}
    inputs = parity.fill_case_inputs(case)
    tokens = torch.stack([inputs[f"tokens_{stream + 1}"] for stream in range(codes)], dim=-1)
    if null_last:
        inputs["labels"][-1] = classes
    with torch.inference_mode():
        contexts = model.contexts(tokens, inputs["labels"])
        inner = model.inner_states(tokens, contexts)
        logits = model.logits(tokens, inputs["labels"])
    losses = [F.cross_entropy(part.transpose(1, 2), tokens[:, :, s], reduction="none") for s, part in enumerate(logits)]
    found = {"context": contexts, "inner": inner, "token_nll": torch.stack(losses)}
    found |= {f"logits_{stream + 1}": part for stream, part in enumerate(logits)}
    assert sampling.pop("new_tokens") == model.token_layout.positions
    settings = {"greedy_cfg": _greedy(sampling)}
    if "cfg_scale_per_code" in sampling:
        scales = tuple(sampling.pop("cfg_scale_per_code"))
        settings["greedy_cfg_per_code"] = _greedy(sampling, guidance_scale=scales)
    for stage in settings.keys() & case["outputs"].keys():
        found[stage] = model.sample(inputs["sample_labels"], settings[stage]).permute(2, 0, 1)
    assert sampling.keys() <= {"cfg_scale", "temperature"}, f"unknown settings {sampling}"
    return found


RUNNERS = {"llamagen-gpt-": run_gpt, "far-": run_far}
