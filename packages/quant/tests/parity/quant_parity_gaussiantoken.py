"""How the case of GaussianToken's quantizer, a fork of `VectorQuantize`, is run on ours."""

from __future__ import annotations

import ast
import re
from types import ModuleType
from typing import Any

import torch
from quant_parity_lucid_vq import Lucid, Stages, known
from torch import Tensor

from smalti.quant.clusters import kmeans
from smalti.quant.entropy import distance_affinities
from smalti.quant.estimators import straight_through
from smalti.quant.softmax import expected_code

# What a stage's description says of its options: the case has them nowhere else.
DESCRIPTIONS = {
    "rotation.dead": r"which codes threshold_ema_dead_code=(\S+) would replace \(cluster_size<\1\)",
    "sync_v.quantized": r"learnable codebook with sync_update_v=(\S+)",
    "diversity.quantized": r"codebook diversity weight (\S+) temperature (\S+)",
    "orthogonal.quantized": r"orthogonal regulariser weight (\S+)",
    "straight_through_softmax.quantized": r"straight-through softmax assignment at temperature (\S+) "
    r"\(deterministic\), plain STE on top",
    "mask.indices": r"mask with row lengths (\S+): padding gives -1",
    "proj.indices": r"(\{.*\}): indices \[B,N,heads\]",
    "proj_separate.indices": r"(\{.*\}): indices \[B,N,heads\]",
    "kmeans.means": r"k-means, (\d+) clusters, (\d+) iterations, starting from the first \1 of the (?:\d+) latents, "
    r"empty clusters keep their mean",
}


class _Case:
    """The case's inputs, and quantizers in the state that every stage starts from."""

    def __init__(self, case: dict[str, Any], parity: ModuleType) -> None:
        fixed = dict.fromkeys(("dim", "codebook_size", "decay", "eps", "commitment_weight", "threshold_ema_dead_code"))
        self.params = known(case["config"], **fixed)
        self.descriptions = case["stages"]
        self.inputs = parity.fill_case_inputs(case)
        self.weights = parity.fill_state_dict(case["state_dict"], case["weight_seed"])
        self.counts = 1.5 + 3 * self.inputs["counts"].sigmoid()

    def described(self, stage: str) -> list[Any]:
        """The values in the description of a stage."""
        found = re.fullmatch(DESCRIPTIONS[stage], self.descriptions[stage])
        assert found, f"no runner understands {self.descriptions[stage]!r} of {stage}"
        return [ast.literal_eval(value) for value in found.groups()]

    def system(self, options: dict[str, Any], *, codebook: str = "codebook", weights: str = "") -> Lucid:
        """The fork with `options` over those of the case, projections from the `weights` of that prefix."""
        params = self.params | options
        embed = self.inputs[codebook]
        embed = embed if params.get("separate_codebook_per_head") else embed[:1]
        counts = self.counts.expand(len(embed), -1)
        state = {
            "_codebook.embed": embed,
            "_codebook.cluster_size": counts,
            "_codebook.embed_avg": embed * counts[..., None],
        }
        if weights:
            state |= {
                key.removeprefix(weights): value for key, value in self.weights.items() if key.startswith(weights)
            }
        return Lucid(params, state)

    def evaluated(self, system: Lucid, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Output and tokens in evaluation."""
        system.quantizer.eval()
        with torch.no_grad():
            output, tokens, _ = system.forward(latent, None)
        return output, tokens

    def trained(self, stage: str, system: Lucid, mask: Tensor | None = None) -> tuple[Stages, Tensor]:
        """The stages of a training step, and the loss as it is returned there."""
        system.quantizer.train()
        latent = self.inputs["latents"].clone().requires_grad_()
        output, tokens, parts = system.forward(latent, mask)
        loss = system.total(parts)
        # The pull on the codes is no part of the number there, although the gradient has it.
        pulled = system.losses.get("codebook", torch.zeros(()))
        ((output * self.inputs["upstream"]).sum() + 0.25 * (loss + pulled)).backward()
        stages = {"quantized": output, "indices": tokens, "grad": latent.grad}
        if system.params["learnable_codebook"]:
            stages["grad_codebook"] = torch.stack([unit.codebook.grad for unit in system.units])
        else:
            statistics = system.statistics(1)
            stages |= {name: statistics[f"{name}_after1"] for name in ("embed", "cluster_size", "embed_avg")}
        return {f"{stage}.{name}": value for name, value in stages.items()}, loss


def _softmax_step(case: _Case, system: Lucid, temperature: float) -> tuple[Stages, Tensor]:
    """The estimator's gradient through all codes does not get past the plain straight-through on top of it."""
    latent = case.inputs["latents"].clone().requires_grad_()
    (unit,) = system.units
    unit.train()
    flat, codebook = latent.flatten(0, 1), unit.codebook.clone()
    mean = expected_code(flat, codebook, distance_affinities(codebook), temperature=temperature).view(latent.shape)
    quantized = unit(latent)
    soft = quantized.latent.detach() + (mean - mean.detach())
    output, loss = straight_through(latent, soft), quantized.losses["commitment"]
    ((output * case.inputs["upstream"]).sum() + 0.25 * loss).backward()
    return {
        "straight_through_softmax.quantized": output,
        "straight_through_softmax.grad": latent.grad,
    }, loss


def quantizer(case: dict[str, Any], parity: ModuleType) -> Stages:
    """Every option of the fork's `VectorQuantize` that works, each from the same state."""
    its = _Case(case, parity)
    latents = its.inputs["latents"]
    published = its.system({})
    evaluated = its.evaluated(published, latents)
    image = its.evaluated(its.system({"accept_image_fmap": True}), its.inputs["image_latents"])
    tokens = its.inputs["tokens"]
    stages = {
        **dict(zip(("eval.quantized", "eval.indices"), evaluated, strict=True)),
        **dict(zip(("eval_map.quantized", "eval_map.indices"), image, strict=True)),
        "lookup": published.quantizer.decode(tokens[..., None], tokens.shape[1:]),
    }

    straight: dict[str, Any] = {"rotation_trick": False}
    learnable: dict[str, Any] = straight | {"learnable_codebook": True, "ema_update": False}
    (threshold,) = its.described("rotation.dead")
    (sync,) = its.described("sync_v.quantized")
    diversity, hotness = its.described("diversity.quantized")
    (orthogonal,) = its.described("orthogonal.quantized")
    (softmax,) = its.described("straight_through_softmax.quantized")
    (lengths,) = its.described("mask.indices")
    steps: dict[str, dict[str, Any]] = {
        "rotation": {},
        "ste": straight,
        "learnable": learnable,
        "sync_v": learnable | {"sync_update_v": sync},
        "cross_entropy": {"commitment_use_cross_entropy_loss": True},
        # There the far codes are the likely ones.
        "diversity": {"codebook_diversity_loss_weight": diversity, "codebook_diversity_temperature": -hotness},
        "orthogonal": learnable | {"orthogonal_reg_weight": orthogonal},
        "straight_through_softmax": straight,
        "mask": {},
    }
    losses = [sum(published.quantizer(latents).losses.values(), torch.zeros(()))]
    for stage, options in steps.items():
        system = its.system(options)
        if stage == "straight_through_softmax":
            found, loss = _softmax_step(its, system, softmax)
        else:
            mask = torch.arange(latents.shape[1]) < torch.tensor(lengths)[:, None] if stage == "mask" else None
            found, loss = its.trained(stage, system, mask)
        stages |= found
        losses.append(loss)
    revived, _ = its.trained("revived", its.system({"threshold_ema_dead_code": threshold}))
    stages["rotation.dead"] = (revived["revived.embed"] != stages["rotation.embed"]).any(-1)

    for stage in ("proj", "proj_separate"):
        (options,) = its.described(f"{stage}.indices")
        system = its.system(options, codebook="codebook2", weights=f"{stage}.")
        wide = its.inputs["wide_latents"]
        output, tokens = its.evaluated(system, wide)
        stages |= {f"{stage}.quantized": output, f"{stage}.indices": tokens}
        stages[f"{stage}.lookup"] = system.quantizer.decode(tokens, wide.shape[1:-1])

    clusters, iterations = its.described("kmeans.means")
    vectors = latents.flatten(0, 1)
    means, bins = kmeans(vectors, vectors[:clusters], iterations, cosine=False)
    stages |= {"kmeans.means": means[None], "kmeans.bins": bins[None], "losses": torch.stack(losses)}
    return {name: value.detach() for name, value in stages.items()}


RUNNERS = {"gaussiantoken-quantizer": quantizer}
