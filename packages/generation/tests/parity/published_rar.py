"""How the cases of RAR's transformers are run on ours."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from layouts import imported
from torch import Tensor

from smalti.core.checkpoints.importing import import_checkpoint
from smalti.core.sampling_settings import SamplingSettings
from smalti.generation.rar import RAR


def _checked(case: dict[str, Any], parity: ModuleType) -> tuple[RAR, dict[str, Any]]:
    """The model, and what the configuration says beside its sizes."""
    left = dict(case["config"])
    for optional, value in {"qkv_bias": True, "qk_norm": True, "layer_norm_eps": 1e-6}.items():
        assert left.pop(optional, value) == value
    model = imported(case, parity, "rar", [])
    options, layout = model.options, model.token_layout
    sizes = "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"
    assert (options.layers, options.dim, options.heads, options.ffn_dim) == tuple(left.pop(key) for key in sizes)
    assert (layout.positions, layout.vocab) == (left.pop("image_seq_len"), (left.pop("codebook_size"),))
    assert model.classes == left.pop("condition_num_classes")
    assert left.pop("none_condition_id", None) in (None, layout.vocab[0] + model.classes + 1)
    return model, left


class _Longer:
    """Also tells the row behind the last token, which the originals compute for nothing: one more place, no target."""

    def __init__(self, model: RAR, case: dict[str, Any], parity: ModuleType) -> None:
        length = model.token_layout.positions
        shape = [f"layout.shape=[[{length + 1}]]", "layout.kind=sequence"]
        weights = parity.fill_state_dict(case["state_dict"], case["weight_seed"])
        for table in ("pos_embed", "target_aware_pos_embed", "timesteps_embeddings"):
            # the number of spare rows is fixed, so the tables of a longer model have a row more
            weights[table] = F.pad(weights[table], (0, 0, 0, 1))
        weights["target_aware_pos_embed"][0, length + 2] = 0
        self.model, self.length = import_checkpoint(weights, overrides=shape), length

    def __call__(self, tokens: Tensor, labels: Tensor, orders: Tensor | None = None) -> Tensor:
        """`(B, L + 1, K)` for `(B, L)`."""
        if orders is not None:
            orders = F.pad(orders, (0, 1), value=self.length)
        with torch.inference_mode():
            (logits,) = self.model.logits(F.pad(tokens, (0, 1))[:, :, None], labels, orders)
        return logits


def _shifted(labels: Tensor, model: RAR) -> Tensor:
    """Labels in the joint vocabulary."""
    return labels + model.token_layout.vocab[0] + 1


def run_rar(case: dict[str, Any], parity: ModuleType) -> Mapping[str, Tensor]:
    model, left = _checked(case, parity)
    sampling = dict(left.pop("sampling"))
    left.pop("tokenizer")  # a file name
    assert not left, f"unknown configuration {left}"
    if not case["outputs"]:
        return {}
    inputs = parity.fill_case_inputs(case)
    tokens, labels = inputs["tokens"], inputs["labels"]
    orders = inputs["orderval"].argsort(dim=1)
    longer, (_, prefix, _) = _Longer(model, case, parity), case["outputs"]["prefix_logits"]["shape"]
    found = {"condition_ids": _shifted(labels, model), "raster_logits": longer(tokens, labels)}
    found["uncond_logits"] = longer(tokens, torch.full_like(labels, model.classes))
    found["random_order_labels"] = tokens.gather(1, orders)
    found["random_order_logits"] = longer(tokens, labels, orders)
    with torch.inference_mode():
        (logits,) = model.logits(tokens[:, :, None], labels, orders)
        (found["prefix_logits"],) = model.logits(tokens[:, :prefix, None], labels)
    nll = F.cross_entropy(logits.transpose(1, 2), found["random_order_labels"], reduction="none")
    found["random_order_nll"] = nll
    scale, power = sampling.pop("guidance_scale"), sampling.pop("guidance_scale_pow")
    sampling.pop("randomize_temperature")  # greedy decoding needs none
    assert not sampling, f"unknown settings {sampling}"
    guided = SamplingSettings(temperature=0, guidance_scale=scale, guidance="power-cosine", guidance_power=power)
    length = model.token_layout.positions
    found["cfg_schedule"] = torch.tensor([guided.guidance_weight(step, step / length) for step in range(length)])
    settings = {
        "greedy_no_cfg": SamplingSettings(temperature=0),
        "greedy_cfg": guided,
        "greedy_cfg_constant": SamplingSettings(temperature=0, guidance_scale=4.0),
    }
    for stage in settings.keys() & case["outputs"].keys():
        found[stage] = model.sample(labels, settings[stage])[:, :, 0]
    found["greedy_logits"] = longer(found["greedy_cfg"], labels)
    return found


def run_robusttok(case: dict[str, Any], parity: ModuleType) -> Mapping[str, Tensor]:
    model, left = _checked(case, parity)
    labels, sampling = torch.tensor(left.pop("labels", [])), dict(left.pop("sample", {}))
    parameters = left.pop("parameters", None)
    assert parameters in (None, sum(_numbers(entry) for entry in case["state_dict"].values()))
    assert not left, f"unknown configuration {left}"
    if not case["outputs"]:
        return {}
    inputs = parity.fill_case_inputs(case)
    tokens, orders = inputs["tokens"], inputs["order_keys"].argsort(dim=1)
    longer = _Longer(model, case, parity)
    settings = SamplingSettings(
        temperature=0,
        guidance_scale=sampling.pop("guidance_scale"),
        guidance="power-cosine",
        guidance_power=sampling.pop("guidance_scale_pow"),
    )
    assert sampling.pop("randomize_temperature").endswith("argmax")
    assert not sampling, f"unknown settings {sampling}"
    return {
        "condition": _shifted(labels, model),
        "logits_raster": longer(tokens, labels),
        "logits_permuted": longer(tokens, labels, orders),
        "labels_permuted": tokens.gather(1, orders),
        "greedy_tokens": model.sample(labels, settings)[:, :, 0],
    }


def _numbers(entry: dict[str, Any]) -> int:
    return int(torch.Size(entry["shape"]).numel())


RUNNERS = {"rar-": run_rar, "xqgan-robusttok-rar-": run_robusttok}
