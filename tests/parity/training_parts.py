"""How the cases of training parts are run that need quantizers or whole tokenizers beside the losses."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from published_xqgan import xqgan_overrides
from safetensors.torch import save_file
from torch import Tensor

from smalti.core.checkpoints.importing import import_checkpoint
from smalti.core.contracts import TokenizerOutput
from smalti.core.losses.alignment import Alignment, AlignmentOptions
from smalti.core.losses.contrastive import contrastive
from smalti.core.losses.dependency import DependencyOptions
from smalti.core.losses.teacher import TeacherOptions
from smalti.core.training.network_images import Normalisation
from smalti.quant.entropy import affinity_entropy
from smalti.quant.factorized import disentanglement
from smalti.quant.multi_scale import MultiScale


def fqgan(case: dict[str, Any], parity: ModuleType) -> dict[str, Tensor]:
    config = dict(case["config"])
    ratio = config.pop("disentanglement_ratio")
    assert config == {"family": "sem"}, config
    inputs = parity.fill_case_inputs(case)
    found, losses = {}, []
    for teacher, statistics in (("clip", "clip"), ("dino", "imagenet")):
        found[f"{teacher}_input"] = Normalisation(224, statistics, "nearest")(inputs["image"])
        sequence = inputs[f"predicted_{teacher}"].requires_grad_()
        predicted, wanted = (
            F.normalize(features, dim=-1) for features in (sequence[:, 0], inputs[f"teacher_{teacher}"])
        )
        loss = contrastive(predicted, wanted, both_ways=False)
        (found[f"grad_{teacher}"],) = torch.autograd.grad(loss, sequence)
        losses.append(loss.detach())
    latents = [inputs[f"quant_{name}"].movedim(1, -1) for name in "abc"]
    losses += [ratio * disentanglement(latents[:2]), ratio * disentanglement(latents)]
    affinities = [-inputs["distances"].square() * factor for factor in (1.0, 0.05)]
    entropies = [affinity_entropy(table, lambda some: some).loss() for table in affinities]
    found["losses"] = torch.stack(losses)
    found["entropy"] = torch.stack([*entropies, torch.zeros(())])
    return found


def _alignment(config: dict[str, Any], teacher: dict[str, Tensor]) -> Alignment:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "teacher.safetensors"
        save_file(teacher, path)
        return AlignmentOptions(
            teacher=TeacherOptions(source=str(path), image_size=config["image_size"]),
            branches=config["product_quant"],
            branch=-1,
            projection="tokenizer",
            normalise=config["clip_norm"],
            scale=config["sem_loss_scale"],
            final_scale=100.0 if config["clip_norm"] else None,
            scale_steps=200,
            leave_out=config["codebook_drop"],
            weight=config["sem_loss_weight"],
        ).build()


def _hits(tokens: Tensor, unit: MultiScale) -> Tensor:
    """XQ-GAN's statistics of one branch, `(scales, codes)`: its counter counts scales, so only the first is copied."""
    (size,) = unit.vocab
    counts = [part.flatten().bincount(minlength=size).float() for part in tokens.split(unit.areas, 1)]
    return torch.stack([count * (1.0 if scale == 0 else 0.1) for scale, count in enumerate(counts)])


def xqgan_forward(case: dict[str, Any], parity: ModuleType) -> dict[str, Tensor]:
    config = case["config"]
    tensors = parity.fill_state_dict(case["state_dict"], case["weight_seed"])
    tokenizer = import_checkpoint(
        tensors,
        overrides=[
            *xqgan_overrides(config),
            # XQ-GAN's VQ class does not divide the commitment loss by the number of scales.
            f"quantizer.quantizers.0.commitment_weight={0.25 * len(config['v_patch_nums'])}",
            "encoder.drop_path=0.0",
            "decoder.drop_path=0.0",
        ],
    ).train()
    inputs = parity.fill_case_inputs(case)
    images = inputs["image"]
    kept = torch.full((len(images),), len(config["v_patch_nums"]))
    dropped = int(len(images) * config["codebook_drop"])
    kept[:dropped] = inputs["kept_scales"][:dropped] + config["start_drop"]
    units = list(tokenizer.quantizer.units)
    for unit in units:
        # A published file has no counter of dropout steps, and what it draws is given here.
        unit.options = unit.options.model_copy(update={"dropout": config["codebook_drop"]})
        unit.kept_scales = lambda batch: kept
    prefix = "semantic_model."
    alignment = _alignment(
        config, {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    )
    alignment.attach(tokenizer)
    dependency = DependencyOptions(branches=config["product_quant"]).build()
    with torch.no_grad():
        output: TokenizerOutput = tokenizer(images)
        losses = [
            torch.zeros(()),
            output.losses["codebook"],
            output.losses["commitment"],
            config["sem_loss_weight"] * alignment(output, images, config["epoch"]),
            config["dependency_loss_weight"] * dependency(output, images, config["epoch"]),
        ]
        hits = torch.stack([_hits(output.tokens[..., branch], unit) for branch, unit in enumerate(units)])
        margin = 0.08 * len(images) * units[0].areas[-1] / hits.shape[-1]  # of the last scale for all of them
        return {
            "reconstruction": output.images,
            "losses": torch.stack(losses),
            "usage": 100 * (hits >= margin).float().mean(-1).mean(0),
            "vocabulary_hits": hits.sum(-1),
            "semantic_class_token": alignment.teacher(images)[:, 0],
        }


RUNNERS = {"fqgan-training-losses": fqgan, "xqgan-training-forward": xqgan_forward}
