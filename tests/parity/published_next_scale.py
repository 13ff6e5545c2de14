"""How the cases of VAR's and ImageFolder's generators with their tokenizers are run on ours."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from published_parts import Case, Stages, check_layout, imported, override, phi_convolutions, unit, var_overrides
from published_xqgan import xqgan_overrides
from torch import Tensor

from smalti.core.sampling_settings import SamplingSettings
from smalti.core.tokenizer import ComposedTokenizer
from smalti.generation.decoding import decoding
from smalti.generation.sampling import TokenSampler
from smalti.generation.var import VAR
from smalti.generation.var_editing import Kept, inside_box, kept_positions

TOKENIZER_KEYS = {
    *("beta", "ch", "ch_mult", "num_res_blocks", "quant_conv_ks", "quant_resi", "share_quant_resi", "using_znorm"),
    *("v_patch_nums", "vocab_size", "z_channels"),
}


class Recorder(TokenSampler):
    """Keeps the guided logits of every stream and scale, and what was drawn from them."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.logits: dict[tuple[int, int], Tensor] = {}
        self.drawn: dict[tuple[int, int], Tensor] = {}

    def draw(self, logits: Tensor, step: int, stream: int = 0, progress: float | None = None) -> Tensor:
        self.logits[step, stream] = self.guided(logits, step, stream, progress).clone()
        self.drawn[step, stream] = super().draw(logits, step, stream, progress)
        return self.drawn[step, stream]

    def scale(self, step: int, streams: int) -> Tensor:
        return torch.cat([self.logits[step, stream] for stream in range(streams)], -1)


def recorded(model: VAR, labels: Tensor, settings: SamplingSettings, kept: Kept | None = None) -> Recorder:
    scales, streams = len(model.token_layout.shape), model.token_layout.streams
    sampler = Recorder.start(settings, labels, None, scales, streams, model.options.label_dropout)
    assert isinstance(sampler, Recorder)
    with decoding(model, settings):
        model.decode(labels, sampler, kept=kept)
    return sampler


def below(case: Case, prefix: str) -> Case:
    """The entries of a case whose names begin so, filled under their whole names."""
    entries = {
        name.removeprefix(prefix): {"fill_as": name, **entry}
        for name, entry in case["state_dict"].items()
        if name.startswith(prefix)
    }
    return case | {"state_dict": entries}


def generator_overrides(left: dict[str, Any], layout: list[int]) -> list[str]:
    return [
        override("layout.shape", [[side, side] for side in layout]),
        override("norm_eps", left.pop("norm_eps")),
        override("heads", left["num_heads"]),
    ]


def check_generator(model: VAR, left: dict[str, Any]) -> None:
    options = model.options
    published = [left.pop(key) for key in ("depth", "embed_dim", "num_heads", "mlp_ratio", "shared_aln")]
    assert published == [options.layers, options.dim, options.heads, options.ffn_ratio, options.shared_modulation]
    assert (left.pop("attn_l2_norm"), left.pop("num_classes")) == (options.cosine_attention, model.classes)
    assert left.pop("cond_drop_rate", 0.0) in (0.0, options.label_dropout)  # the cases turn the drop of labels off


def settings_of(sample: dict[str, Any]) -> SamplingSettings:
    left = dict(sample)
    assert (left.pop("top_k"), left.pop("top_p"), left.pop("more_smooth", False)) == (1, 0.0, False)
    settings = SamplingSettings(guidance_scale=1 + left.pop("cfg"), guidance="linear", temperature=0)
    assert not left, f"unknown settings {left}"
    return settings


def teacher_forced(model: VAR, tokens: Tensor, labels: Tensor) -> Stages:
    """Stages of given tokens `(B, L, S)`."""
    with torch.inference_mode():
        logits, null = (model.logits(tokens, rows) for rows in (labels, torch.full_like(labels, model.classes)))
        return {
            "var_input": model.inputs._latents(tokens),
            "logits": torch.cat(logits, -1),
            "logits_argmax": torch.stack([part.argmax(-1) for part in logits], 1),
            "logits_unconditional": torch.cat(null, -1),
            "loss": torch.stack([torch.zeros(()), *model.loss(tokens, labels).values()]).cumsum(0)[[0, -1]],
        }


def sampled(model: VAR, tokenizer: ComposedTokenizer, labels: Tensor, settings: SamplingSettings) -> Stages:
    streams, last = model.token_layout.streams, len(model.token_layout.shape) - 1
    sampler = recorded(model, labels, settings)
    drawn = model.draw(labels, settings)
    image = tokenizer.decode(drawn.tokens)
    with torch.no_grad():
        assert torch.equal(tokenizer.decode_latent(drawn.latent), image)
    found = {f"sample_logits_scale{scale}": sampler.scale(scale, streams) for scale in range(last + 1)}
    found["sample_logits_last"] = sampler.scale(last, streams)
    return found | {"sample_tokens": drawn.tokens.movedim(-1, 1), "sample_image": unit(image)}


def loaded(case: Case, parity: ModuleType, left: dict[str, Any]) -> tuple[VAR, ComposedTokenizer]:
    """VAR and its tokenizer, from two files."""
    scales, parts = left.pop("patch_nums"), left.pop("vae")
    assert parts.keys() <= TOKENIZER_KEYS, f"unknown configuration {parts}"
    assert parts["v_patch_nums"] == scales
    tokenizer = imported(below(case, "vae."), parity, var_overrides(parts, scales), "var-vqvae")
    model = imported(below(case, "var."), parity, generator_overrides(left, scales))
    assert isinstance(tokenizer, ComposedTokenizer)
    assert isinstance(model, VAR)
    assert model.options.code_width == parts["z_channels"]
    assert model.token_layout.vocab == (parts["vocab_size"],)
    assert len(tokenizer.quantizer.phi) == phi_convolutions(parts, scales)
    model.attach(tokenizer)
    check_generator(model, left)
    return model, tokenizer


def generator(case: Case, parity: ModuleType) -> Stages:
    left = dict(case["config"])
    model, tokenizer = loaded(case, parity, left)
    labels, settings = torch.tensor(left.pop("labels")), settings_of(left.pop("sample"))
    assert not left, f"unknown configuration {left}"
    tokens = parity.fill_case_inputs(case)["tokens"][..., None]
    found = teacher_forced(model, tokens, labels) | sampled(model, tokenizer, labels, settings)
    # One stream has no axis of its own in these cases.
    return found | {name: found[name].squeeze(1) for name in ("logits_argmax", "sample_tokens")}


def edit(case: Case, parity: ModuleType) -> Stages:
    left = dict(case["config"])
    model, tokenizer = loaded(case, parity, left)
    labels, settings, box = torch.tensor(left.pop("labels")), settings_of(left.pop("sample")), left.pop("edit")
    assert not left, f"unknown configuration {left}"
    tokens = parity.fill_case_inputs(case)["tokens"][..., None]
    layout = model.token_layout
    inside = inside_box(layout, box.pop("y0"), box.pop("x0"), box.pop("y1"), box.pop("x1"))
    assert not box, f"unknown box {box}"
    found = {}
    for name, mask in (("inpaint", ~inside), ("outpaint", inside)):
        kept = kept_positions(mask, layout)
        edited = model.edit(tokens, mask, labels, settings)
        assert torch.equal(edited.tokens[:, kept], tokens[:, kept])
        found[f"{name}_mask"] = mask.long()
        found[f"{name}_mask_per_scale"] = kept.long()
        sampler = recorded(model, labels, settings, Kept(tokens, kept))
        found[f"{name}_tokens"] = torch.cat(list(sampler.drawn.values()), 1)
        found[f"{name}_image"] = unit(tokenizer.decode(edited.tokens))
    return found


def product(case: Case, parity: ModuleType) -> Stages:
    """ImageFolder's, from one file."""
    left = dict(case["config"])
    scales, parts = left.pop("patch_nums"), left.pop("tokenizer")
    left.pop("p_drop")  # of training
    overrides = generator_overrides(left, scales)
    if not case["outputs"]:
        model = check_layout(case, overrides)
        assert isinstance(model, VAR)
        parameters = left.pop("parameters")
        assert parameters == sum(weight.numel() for weight in model.parameters())
        check_generator(model, left)
        assert not left, f"unknown configuration {left}"
        assert model.token_layout.vocab == (parts["codebook_size"],) * parts["product_quant"]
        return {}
    model = imported(case, parity, overrides)
    assert isinstance(model, VAR)
    assert parts["v_patch_nums"] == scales
    tokenizer = imported(below(case, "vae_local."), parity, xqgan_overrides(parts))
    assert isinstance(tokenizer, ComposedTokenizer)
    model.attach(tokenizer)
    check_generator(model, left)
    labels, settings = torch.tensor(left.pop("labels")), settings_of(left.pop("sample"))
    assert not left, f"unknown configuration {left}"
    tokens = parity.fill_case_inputs(case)["tokens"].movedim(1, -1)
    return teacher_forced(model, tokens, labels) | sampled(model, tokenizer, labels, settings)


RUNNERS = {"var-generator-": generator, "var-edit-": edit, "xqgan-var-": product}
