"""How the cases of vector quantizers are run on ours: VQ of four systems, SimVQ, IBQ, and the parts they share."""

from __future__ import annotations

from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from quant_parity_lucid_vq import Stages, known, lucid, lucid_topk, pair
from torch import Tensor

from smalti.core.codebook_health import CodebookHealth
from smalti.core.contracts import Quantizer
from smalti.quant.clusters import kmeans
from smalti.quant.ema import EmaStatistics
from smalti.quant.entropy import affinity_entropy, dot_affinities
from smalti.quant.estimators import diveq, rotation_trick, straight_through
from smalti.quant.ibq import IndexBackpropagationOptions
from smalti.quant.lookup import nearest_code
from smalti.quant.orthogonal import orthogonal_loss
from smalti.quant.simvq import SimVQOptions
from smalti.quant.vector import VectorQuantizerOptions


def _perplexity(tokens: Tensor, size: int) -> Tensor:
    health = CodebookHealth((size,))
    health.update(tokens.reshape(1, -1, 1))
    return pair(health.result()["perplexity"][0])


class _Run:
    """One training step on a channel-first latent: sum(output * probe) and weighted losses, backwards."""

    def __init__(self, case: dict[str, Any], parity: ModuleType, quantizer: Quantizer, scale: float) -> None:
        inputs = parity.fill_case_inputs(case)
        latent = (inputs["latent"] * scale).requires_grad_()
        quantized = quantizer.train()(latent.movedim(1, -1))
        output = quantized.latent.movedim(-1, 1)
        self.losses = quantized.losses
        ((output * inputs["probe"]).sum() + sum(self.losses.values())).backward()
        self.stages: Stages = {
            "quantized": output,
            "indices": quantized.tokens.view(len(latent), *latent.shape[2:]),
            "grad_latent": latent.grad,
        }


def vistok(case: dict[str, Any], parity: ModuleType) -> Stages:
    """VQ, SimVQ and IBQ of visual-tokenizer-pytorch."""
    config = known(case["config"], **{"class": None, "params": {}, "latent_scale": 1.0, "weights": {}})
    weights = known(config["weights"], commit=0.25, vq=1.0, entropy=0.1)
    state = parity.fill_state_dict(case["state_dict"], case["weight_seed"])
    defaults: dict[str, Any] = {"codebook_num": None, "codebook_dim": None}
    regularised = {"use_entropy_reg": False, "entropy_reg_temp": 0.01}
    common = {"commitment_weight": weights["commit"], "codebook_weight": weights["vq"]}

    def entropy(params: dict[str, Any]) -> dict[str, Any]:
        weight = weights["entropy"] if params["use_entropy_reg"] else 0.0
        return {"entropy_weight": weight, "entropy_temperature": params["entropy_reg_temp"]}

    if config["class"] == "SimVQQuantizer":
        params = known(config["params"], **defaults)
        sizes = {"dim": params["codebook_dim"], "codebook_size": params["codebook_num"]}
        simvq = SimVQOptions(**sizes, bias=True, **common).build()
        simvq.load_state_dict(
            {
                "frozen": state["codebook.weight"],
                "transform.weight": state["codebook_proj.weight"],
                "transform.bias": state["codebook_proj.bias"],
            }
        )
        run = _Run(case, parity, simvq, config["latent_scale"])
        gradients = {f"grad_codebook_proj_{name}": weight.grad for name, weight in simvq.transform.named_parameters()}
        vq = run.losses["codebook"] / weights["vq"]
    elif config["class"] == "IndexBackpropagationQuantizer":
        params = known(config["params"], **defaults, **regularised)
        sizes = {"dim": params["codebook_dim"], "codebook_size": params["codebook_num"]}
        ibq = IndexBackpropagationOptions(**sizes, **common, double_weight=weights["vq"], **entropy(params)).build()
        ibq.load_state_dict({"codebook": state["codebook.weight"]})
        run = _Run(case, parity, ibq, config["latent_scale"])
        gradients = {"grad_codebook_weight": ibq.codebook.grad}
        vq = (run.losses["codebook"] + run.losses["double"]) / weights["vq"]
    else:
        assert config["class"] == "VectorQuantizer"
        params = known(config["params"], **defaults, **regularised, l2_norm=False, use_ema_update=False, ema_decay=0.99)
        cosine = {"cosine": True, "unit_length": "codes"} if params["l2_norm"] else {}
        sizes = {"dim": params["codebook_dim"], "codebook_size": params["codebook_num"]} | cosine
        learnt = VectorQuantizerOptions(**sizes, **common, **entropy(params)).build()
        learnt.load_state_dict({"codebook": state["codebook.weight"]})
        run = _Run(case, parity, learnt, config["latent_scale"])
        gradients = {"grad_codebook_weight": learnt.codebook.grad}
        vq = run.losses["codebook"] / weights["vq"]
        if params["use_ema_update"]:
            # There the codes are parameters whose gradient exists and is left alone.
            averaged = VectorQuantizerOptions(
                **sizes, update="ema", ema_decay=params["ema_decay"], ema_smoothing=False
            ).build()
            averaged.load_state_dict(
                {
                    "codebook": state["codebook.weight"],
                    "learning.ema.counts": state["ema_sumn"],
                    "learning.ema.sums": state["ema_sumz"],
                }
            )
            step = _Run(case, parity, averaged, config["latent_scale"])
            assert torch.equal(step.stages["quantized"], run.stages["quantized"])
            run.stages |= {"codebook_after": averaged.codebook, "ema_sumz_after": averaged.learning.ema.sums}
            run.stages |= {"ema_sumn_after": averaged.learning.ema.counts}
    if "entropy" in run.losses:
        run.stages["loss_entropy"] = pair(run.losses["entropy"] / weights["entropy"])
    return {
        **run.stages,
        **gradients,
        "loss_commit": pair(run.losses["commitment"] / weights["commit"]),
        "loss_vq": pair(vq),
        "perplexity": _perplexity(run.stages["indices"], params["codebook_num"]),
    }


def taming(case: dict[str, Any], parity: ModuleType) -> Stages:
    """The quantizers of taming-transformers and IBQ, as SEED-Voken has them."""
    config = known(case["config"], **{"class": None, "params": {}, "latent_scale": 1.0, "weights": {}})
    weights = known(config["weights"], quant=1.0, entropy=0.05)
    state = parity.fill_state_dict(case["state_dict"], case["weight_seed"])
    defaults: dict[str, Any] = {"n_e": None, "e_dim": None, "beta": 0.25}
    if config["class"] == "IndexPropagationQuantize":
        params = known(
            config["params"],
            **defaults,
            use_entropy_loss=False,
            entropy_temperature=0.01,
            sample_minimization_weight=1.0,
            batch_maximization_weight=1.0,
            cosine_similarity=False,  # does nothing there
        )
        options = IndexBackpropagationOptions(
            dim=params["e_dim"],
            codebook_size=params["n_e"],
            double_weight=weights["quant"],
            commitment_weight=weights["quant"],
            codebook_weight=weights["quant"] * params["beta"],
            entropy_weight=weights["entropy"] if params["use_entropy_loss"] else 0.0,
            entropy_temperature=params["entropy_temperature"],
            sample_weight=params["sample_minimization_weight"],
            batch_weight=params["batch_maximization_weight"],
        )
    else:
        if config["class"] == "VectorQuantizer":
            params = known(config["params"], **defaults) | {"legacy": True, "l2_normalize": False}
        else:
            assert config["class"] == "VectorQuantizer2"
            params = known(config["params"], **defaults, legacy=True, l2_normalize=False)
        commitment, codebook = (1.0, params["beta"]) if params["legacy"] else (params["beta"], 1.0)
        options = VectorQuantizerOptions(
            dim=params["e_dim"],
            codebook_size=params["n_e"],
            commitment_weight=weights["quant"] * commitment,
            codebook_weight=weights["quant"] * codebook,
            **({"cosine": True, "unit_length": "search"} if params["l2_normalize"] else {}),
        )
    quantizer = options.build()
    quantizer.load_state_dict({"codebook": state["embedding.weight"]})
    run = _Run(case, parity, quantizer, config["latent_scale"])
    entropy = run.losses.pop("entropy", None)
    if entropy is not None:
        latent = parity.fill_case_inputs(case)["latent"] * config["latent_scale"]
        codes = dot_affinities(quantizer.codebook)
        entropies = affinity_entropy(latent.movedim(1, -1).flatten(0, 2), codes, params["entropy_temperature"])
        run.stages |= {"sample_entropy": pair(entropies.sample), "avg_entropy": pair(entropies.batch)}
        run.stages["entropy_loss"] = pair(entropy / weights["entropy"])
    return {
        **run.stages,
        "grad_embedding": quantizer.codebook.grad,
        "quant_loss": pair(sum(run.losses.values()) / weights["quant"]),
        "perplexity": _perplexity(run.stages["indices"], params["n_e"]),
    }


def embedding_ema(case: dict[str, Any], parity: ModuleType) -> Stages:
    """EMA with Laplace smoothing."""
    config = known(case["config"], decay=0.99)
    inputs = parity.fill_case_inputs(case)
    tokens = nearest_code(inputs["latent"], inputs["weight"])
    statistics = EmaStatistics(inputs["weight"], config["decay"])
    statistics.update(tokens, inputs["latent"])
    return {
        "indices": tokens,
        "cluster_size": statistics.counts,
        "embed_avg": statistics.sums,
        "weight_after": statistics.codebook(),
    }


def lucid_simvq(case: dict[str, Any], parity: ModuleType) -> Stages:
    """SimVQ of vector-quantize-pytorch."""
    config = known(case["config"], params=None, latent_scale=1.0)
    params = known(
        config["params"],
        dim=None,
        codebook_size=None,
        frozen_codebook_dim=None,
        rotation_trick=True,
        input_to_quantize_commit_loss_weight=0.25,
        commitment_weight=1.0,
        channel_first=False,
    )
    quantizer = SimVQOptions(
        dim=params["dim"],
        codebook_size=params["codebook_size"],
        frozen_dim=params["frozen_codebook_dim"],
        estimator="rotation" if params["rotation_trick"] else "straight-through",
        commitment_weight=params["commitment_weight"] * params["input_to_quantize_commit_loss_weight"],
        codebook_weight=params["commitment_weight"],
    ).build()
    state = parity.fill_state_dict(case["state_dict"], case["weight_seed"])
    quantizer.load_state_dict({"frozen": state["frozen_codebook"], "transform.weight": state["code_transform.weight"]})
    inputs = parity.fill_case_inputs(case)
    if not params["channel_first"]:
        inputs = {name: value.movedim(-1, 1) for name, value in inputs.items()}
    latent = (inputs["latent"] * config["latent_scale"]).requires_grad_()
    quantized = quantizer.train()(latent.movedim(1, -1))
    output = quantized.latent.movedim(-1, 1)
    loss = sum(quantized.losses.values())
    ((output * inputs["probe"]).sum() + loss).backward()
    space = tuple(latent.shape[2:])
    decoded = quantizer.decode(quantized.tokens, space).movedim(-1, 1)
    stages = {"quantized": output, "grad_latent": latent.grad, "decode": decoded}
    if not params["channel_first"]:
        stages = {name: value.movedim(1, -1) for name, value in stages.items()}
    return {
        **stages,
        "indices": quantized.tokens.view(len(latent), *space),
        "loss": pair(loss),
        "grad_code_transform_weight": quantizer.transform.weight.grad,
    }


def lucid_functions(case: dict[str, Any], parity: ModuleType) -> Stages:
    """Estimators and regularisers as functions."""
    known(case["config"])
    inputs = parity.fill_case_inputs(case)
    stages: Stages = {}
    functions = {
        "rotate": rotation_trick,
        "straight": straight_through,
        "directional": lambda source, target: diveq(source, target, 0.0),
    }
    for name, function in functions.items():
        source, target = (inputs[key].clone().requires_grad_() for key in ("src", "tgt"))
        stages[name] = function(source, target)
        (stages[name] * inputs["probe"]).sum().backward()
        stages |= {f"{name}_grad_src": source.grad, f"{name}_grad_tgt": target.grad}
    statistics = EmaStatistics(torch.ones(6, 1), 0.9)
    smoothed = []
    for counts in inputs["src"][0].abs():
        statistics.counts.copy_(counts)
        statistics.sums.copy_(torch.ones(6, 1))
        smoothed.append(1 / statistics.codebook()[:, 0] / counts.sum())
    codebook = VectorQuantizerOptions(dim=6, codebook_size=10, update="none").build()
    distances = []
    for source, target in zip(inputs["src"], inputs["tgt"], strict=True):
        codebook.load_state_dict({"codebook": target})
        distances.append(codebook.distances(source[None])[0].clamp(min=1e-8).sqrt())
    unit = VectorQuantizerOptions(dim=6, codebook_size=30, update="none", cosine=True).build()
    unit.load_state_dict({"codebook": inputs["src"].flatten(0, 1)})
    return {
        **{name: value for name, value in stages.items() if value is not None},
        "laplace": torch.stack(smoothed),
        "orthogonal": pair(orthogonal_loss(inputs["src"])),
        "l2norm": unit.decode(torch.arange(30)[None, :, None], (30,)).view(3, 10, 6),
        "cdist": torch.stack(distances),
    }


def lucid_kmeans(case: dict[str, Any], parity: ModuleType) -> Stages:
    """k-means, and a first training batch with k-means, averages and revival; whatever is drawn, it is the first."""
    config = known(case["config"], clusters=None, iters=10, threshold=None)
    (samples,) = parity.fill_case_inputs(case)["samples"]
    unit_samples = F.normalize(samples, dim=1)
    clusters = config["clusters"]
    means, bins = kmeans(samples, samples[:clusters], config["iters"], cosine=False)
    cosine_means, cosine_bins = kmeans(unit_samples, unit_samples[:clusters], config["iters"], cosine=True)
    quantizer = VectorQuantizerOptions(
        dim=samples.shape[1],
        codebook_size=clusters,
        update="ema",
        ema_decay=0.8,
        initialise="data",
        revive_below=config["threshold"],
    ).build()
    first = {"side_effect": lambda vectors, count, seed: vectors[:count]}
    with (
        patch("smalti.quant.revival.shared_sample", **first),
        patch("smalti.quant.revival.KMEANS_ITERATIONS", config["iters"]),
    ):
        quantized = quantizer.train()(samples[None])
    return {
        "means": means[None],
        "bins": bins[None],
        "means_cos": cosine_means[None],
        "bins_cos": cosine_bins[None],
        "init_indices": quantized.tokens[..., 0],
        "init_embed": quantizer.codebook[None],
        "init_cluster_size": quantizer.learning.ema.counts[None],
        "init_embed_avg": quantizer.learning.ema.sums[None],
    }


RUNNERS = {
    "quant-vistok-vq": vistok,
    "quant-vistok-simvq": vistok,
    "quant-vistok-ibq": vistok,
    "quant-taming-": taming,
    "quant-taming-embedding-ema": embedding_ema,
    "quant-ibq": taming,
    "quant-lucid-vq": lucid,
    "quant-lucid-vq-topk": lucid_topk,
    "quant-lucid-simvq": lucid_simvq,
    "quant-lucid-functions": lucid_functions,
    "quant-lucid-kmeans": lucid_kmeans,
}
