"""How the cases of FQGAN's tokenizers are run on ours."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from published_parts import check_layout, imported, override
from torch import Tensor, nn


def _overrides(config: dict[str, Any]) -> list[str]:
    """What names and shapes do not tell: heads of attention, the kind of search, the weights of the losses."""
    unit = "quantizer.quantizers.0"
    disentanglement = config["disentanglement_ratio"] if config["with_disentanglement"] else 0.0
    heads = config["feature_heads"] if config["with_clip_supervision"] else {}
    return [
        *(override(f"feature_heads.{name}.heads", head["heads"]) for name, head in heads.items()),
        override("encoder.adapter_heads", config["adapter"]["heads"]),
        override(f"{unit}.cosine", config["codebook_l2_norm"]),
        override(f"{unit}.commitment_weight", config["commit_loss_beta"]),
        override(f"{unit}.entropy_weight", config["entropy_loss_ratio"]),
        override("quantizer.disentanglement_weight", disentanglement),
        override("encoder.dropout", config["dropout_p"]),
        override("decoder.dropout", config["dropout_p"]),
    ]


def _check(tokenizer: nn.Module, config: dict[str, Any]) -> None:
    """What the layout found must be what the case configures; nothing of the configuration is left over."""
    left = dict(config)
    options, encoder = tokenizer.options, tokenizer.options.encoder
    assert (left.pop("family"), left.pop("vq_model")) == ("fqgan", {8: "VQ-8", 16: "VQ-16"}[left["downsample"]])
    assert encoder.factor == left.pop("downsample")
    assert encoder.branches == tuple(left.pop("branches"))
    assert tokenizer.quantizer.vocab == (left.pop("codebook_size"),) * len(encoder.branches)
    assert encoder.code_width == left.pop("codebook_embed_dim")
    assert encoder.width == options.decoder.width == left.pop("ch")
    assert encoder.multipliers == options.decoder.multipliers == tuple(left.pop("ch_mult"))
    blocks = left.pop("num_res_blocks")
    assert (encoder.blocks, options.decoder.blocks) == (blocks, blocks + 1)
    assert encoder.latent_width == options.decoder.latent_width == left.pop("z_channels")
    assert left.pop("in_channels") == left.pop("out_channels") == options.preprocessing.channels
    assert options.preprocessing.image_size == encoder.image_size == left.pop("image_size")
    adapter = left.pop("adapter")
    assert adapter == {
        "width": encoder.widths[-1],
        "layers": encoder.adapter_depth,
        "heads": encoder.adapter_heads,
        "mlp_ratio": 4.0,
    }
    heads = left.pop("feature_heads")
    if left.pop("with_clip_supervision"):
        assert heads == {
            name: {"width": head.width, "layers": head.depth, "heads": head.heads}
            for name, head in options.feature_heads.items()
        }
    for key in (
        "codebook_l2_norm",
        "commit_loss_beta",
        "entropy_loss_ratio",
        "with_disentanglement",
        "disentanglement_ratio",
        "dropout_p",
    ):
        left.pop(key)
    left.pop("codebook_show_usage")  # statistics
    assert not left, f"unknown configuration {left}"


def _train_losses(tokenizer: nn.Module, image: Tensor) -> Tensor:
    """Codebook, commitment and entropy loss of each branch, then the disentanglement."""
    quantizer, found = tokenizer.quantizer, []
    hooks = [
        unit.register_forward_hook(lambda _module, _inputs, quantized: found.append(quantized.losses))
        for unit in quantizer.product.units
    ]
    losses = tokenizer.train()(image).losses
    for hook in hooks:
        hook.remove()
    tokenizer.eval()
    zero = torch.zeros(())
    terms = [branch.get(name, zero) for branch in found for name in ("codebook", "commitment", "entropy")]
    return torch.stack([*terms, losses.get("disentanglement", zero)]).detach()


def fqgan(case: dict[str, Any], parity: ModuleType) -> dict[str, Tensor]:
    config = case["config"]
    layout = "fqgan-with-feature-heads" if config["with_clip_supervision"] else None
    if not case["outputs"]:
        _check(check_layout(case, _overrides(config), layout), config)
        check_layout(case)  # as it is recognised, without the feature heads
        return {}
    inputs = parity.fill_case_inputs(case)
    tokenizer = imported(case, parity, _overrides(config), layout)
    _check(tokenizer, config)
    branches, widths = tokenizer.options.encoder.branches, tokenizer.quantizer.product.widths
    given = torch.stack([inputs[f"tokens_{branch}"].flatten(1) for branch in branches], dim=-1)
    space = tuple(inputs[f"tokens_{branches[0]}"].shape[1:])
    found = {}
    with torch.no_grad():
        latent = tokenizer.encoder(inputs["image"])
        quantized = tokenizer.quantizer(latent)
        for branch, read in tokenizer.encoder.read(inputs["image"]).items():
            found[f"encoder_{branch}"] = read.movedim(-1, 1)
        for stage, whole in (("latent", latent), ("quantized", quantized.latent)):
            for branch, part in zip(branches, whole.split(widths, -1), strict=True):
                found[f"{stage}_{branch}"] = part.movedim(-1, 1)
        output = tokenizer(inputs["image"])
        for number, branch in enumerate(branches):
            found[f"tokens_{branch}"] = output.tokens[..., number].flatten()
        codes = tokenizer.quantizer.decode(given, space)
        found["reconstruction"] = output.images
        found["decoded"] = tokenizer.decoder(tokenizer.from_codes(codes))
        for branch in config["feature_heads"] if config["with_clip_supervision"] else ():
            found[f"feature_{branch}"] = tokenizer.feature_heads[branch](codes)
        if "train_losses" in case["outputs"]:
            found["train_losses"] = _train_losses(tokenizer, inputs["image"])
    return found


RUNNERS = {"fqgan-dual": fqgan, "fqgan-triple": fqgan}
