"""How the cases of TiTok's MaskGIT generators are run on ours."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from layouts import imported
from torch import Tensor

from smalti.core.sampling_settings import SamplingSettings

GREEDY = {
    # the originals add scale times the difference in these two modes, so that our weight is one more
    "greedy_constant": SamplingSettings(temperature=0, steps=8, guidance_scale=4.0),
    "greedy_linear": SamplingSettings(temperature=0, steps=8, guidance_scale=5.5, guidance="linear", annealing=True),
    "greedy_power_cosine": SamplingSettings(
        temperature=0, steps=8, guidance_scale=6.9, guidance="power-cosine", guidance_power=3.0, annealing=True
    ),
}
SAMPLING = {
    "num_steps", "randomize_temperature", "guidance_scale", "guidance_decay", "guidance_scale_pow",
    "softmax_temperature_annealing",
}  # fmt: skip


def run_maskgit(case: dict[str, Any], parity: ModuleType) -> Mapping[str, Tensor]:
    left = dict(case["config"])
    form = {"ViT": "vit", "UViT": "uvit"}[left.pop("model_type")]
    assert left.pop("sampling").keys() == SAMPLING
    overrides = [f"heads={left.pop('num_attention_heads')}", f"norm_eps={left.pop('layer_norm_eps')}"]
    model = imported(case, parity, "titok-maskgit", overrides)
    options, layout = model.options, model.token_layout
    assert options.form == form
    sizes = "num_hidden_layers", "hidden_size", "intermediate_size"
    assert (options.layers, options.dim, options.ffn_dim) == tuple(left.pop(key) for key in sizes)
    dropouts = left.pop("dropout"), left.pop("attn_drop")
    # named, but not used in the other form
    assert form == "uvit" or (options.dropout, options.attention_dropout) == dropouts
    codes = left.pop("codebook_size")
    assert (layout.positions, layout.vocab) == (left.pop("image_seq_len"), (codes,))
    assert model.classes == left.pop("condition_num_classes")
    assert (left.pop("mask_token_id"), left.pop("none_condition_id")) == (codes, codes + model.classes + 1)
    assert not left, f"unknown configuration {left}"
    if not case["outputs"]:
        return {}
    inputs = parity.fill_case_inputs(case)
    labels = inputs["labels"]
    masked = inputs["tokens"].masked_fill(inputs["maskval"] > 0, codes)
    with torch.inference_mode():
        (logits,) = model.logits(masked[:, :, None], labels)
        (null,) = model.logits(masked[:, :, None], torch.full_like(labels, model.classes))
    found = {"masked_tokens": masked, "logits": logits, "uncond_logits": null, "argmax": logits.argmax(-1)}
    for stage in GREEDY.keys() & case["outputs"].keys():
        found[stage] = model.sample(labels, GREEDY[stage])[:, :, 0]
    return found


RUNNERS = {"titok-generator-": run_maskgit, "titok-maskgit-": run_maskgit}
