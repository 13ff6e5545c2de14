"""How the cases of VAR that need no tokenizer are run on ours: layouts, and filters."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from layouts import imported
from torch import Tensor

from smalti.core.sampling_settings import SamplingSettings
from smalti.generation.sampling import filtered


def run_layout(case: dict[str, Any], parity: ModuleType) -> Mapping[str, Tensor]:
    left = dict(case["config"])
    assert not case["outputs"], "a case with outputs needs the tokenizer"
    sides = left.pop("patch_nums")
    grids = [[side, side] for side in sides]
    overrides = [f"layout.shape={grids}", f"norm_eps={left.pop('norm_eps')}", f"heads={left['num_heads']}"]
    model = imported(case, parity, "var", overrides)
    options = model.options
    published = [left.pop(key) for key in ("depth", "embed_dim", "num_heads", "mlp_ratio", "shared_aln")]
    assert published == [options.layers, options.dim, options.heads, options.ffn_ratio, options.shared_modulation]
    assert (left.pop("attn_l2_norm"), left.pop("num_classes")) == (options.cosine_attention, model.classes)
    left.pop("cond_drop_rate")  # of training
    tokenizer = left.pop("vae")
    assert model.token_layout.vocab == (tokenizer["vocab_size"],)
    assert (options.code_width, tokenizer["v_patch_nums"]) == (tokenizer["z_channels"], sides)
    assert sum(weight.numel() for weight in model.parameters()) == left.pop("parameters")
    assert not left, f"unknown configuration {left}"
    return {}


def run_filter(case: dict[str, Any], parity: ModuleType) -> Mapping[str, Tensor]:
    left = dict(case["config"])
    logits = parity.fill_case_inputs(case)["logits"]
    found = {}
    for name, (k, p) in left.pop("settings").items():
        # A p of 0 is none in VAR, as 1 is here.
        probabilities = filtered(logits.flatten(0, -2), SamplingSettings(top_k=k, top_p=p or 1.0)).softmax(-1)
        found[f"{name}_probabilities"] = probabilities.view(logits.shape)
        found[f"{name}_kept"] = (found[f"{name}_probabilities"] > 0).sum(-1)
    assert not left, f"unknown configuration {left}"
    return found


RUNNERS = {"var-d": run_layout, "var-sampling-filter": run_filter}
