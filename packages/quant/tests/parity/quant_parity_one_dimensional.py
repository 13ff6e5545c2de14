"""How the quantizer cases of the 1-D tokenizers are run on ours: TiTok's, and that of its study on BDD100K."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from quant_parity_lucid_vq import Stages, known
from torch import Tensor

from smalti.quant.entropy import affinity_entropy, distance_affinities
from smalti.quant.vector import VectorQuantizerOptions


def _pair(value: Tensor) -> Tensor:
    """The cases store a scalar followed by its double."""
    return torch.stack([value, 2 * value]).detach()


def _row(latent: Tensor) -> Tensor:
    """Ours `(B, N, D)` as the original's `(B, D, 1, N)`, or the way back."""
    return latent.transpose(1, 2).unsqueeze(2) if latent.ndim == 3 else latent.squeeze(2).transpose(1, 2)


def titok(case: dict[str, Any], parity: ModuleType) -> Stages:
    """One training step of TiTok's quantizer."""
    config = known(
        case["config"],
        codebook_size=None,
        token_size=None,
        commitment_cost=0.25,
        use_l2_norm=False,
        clustering_vq=False,
        decay=0.99,
    )
    quantizer = VectorQuantizerOptions(
        dim=config["token_size"],
        codebook_size=config["codebook_size"],
        cosine=config["use_l2_norm"],
        commitment_weight=config["commitment_cost"],
        anchor_decay=config["decay"] if config["clustering_vq"] else None,
    ).build()
    state = parity.fill_state_dict(case["state_dict"], case["weight_seed"])
    usage = {"learning.anchors.usage": state["embed_prob"]} if config["clustering_vq"] else {}
    quantizer.load_state_dict({"codebook": state["embedding.weight"], **usage})
    latent = parity.fill_case_inputs(case)["z"].requires_grad_()
    quantized = quantizer.train()(_row(latent))
    losses = quantized.losses
    (quantized.latent.pow(3).sum() + sum(losses.values())).backward()
    anchors = quantizer.learning.anchors
    return {
        **({} if anchors is None else {"embed_prob": anchors.usage, "codebook_after": quantizer.codebook}),
        "tokens": quantized.tokens.transpose(1, 2),
        "quantized": _row(quantized.latent),
        "commitment_loss": _pair(losses["commitment"]),
        "codebook_loss": _pair(losses["codebook"]),
        "quantizer_loss": _pair(sum(losses.values(), torch.zeros(()))),
        "z_grad": latent.grad,
        "codebook_grad": quantizer.codebook.grad,
    }


def _entropy_weight(step: int) -> float:
    """The study's schedule: from 0.1 in a line down to a hundredth of it at step 10,000."""
    return 0.1 * (1.0 - 0.99 * min(step / 10_000, 1.0))


def study(case: dict[str, Any], parity: ModuleType) -> Stages:
    """One training step.

    The original overwrites its codebook with unit codes before every search. The option `cosine` is not that: it
    leaves the codebook alone and its gradient goes through the normalisation. Nor has `vq` an option for the floor of
    the logarithm. So unit vectors and codes are handed in from here, and the entropy is taken from its own function.
    """
    config = known(
        case["config"],
        n_e=None,
        e_dim=None,
        beta=0.25,
        normalize_embedding=True,
        legacy=True,
        diversity_gamma=1.0,
        frac_per_sample_entropy=1.0,
        inv_temperature=100.0,
    )
    assert config["frac_per_sample_entropy"] == 1  # else random tokens
    unit = config["normalize_embedding"]
    commitment, codebook = (1.0, config["beta"]) if config["legacy"] else (config["beta"], 1.0)
    quantizer = VectorQuantizerOptions(
        dim=config["e_dim"], codebook_size=config["n_e"], commitment_weight=commitment, codebook_weight=codebook
    ).build()
    codes = parity.fill_state_dict(case["state_dict"], case["weight_seed"])["embedding.weight"]
    quantizer.load_state_dict({"codebook": F.normalize(codes, dim=-1) if unit else codes})
    latent = parity.fill_case_inputs(case)["z"].requires_grad_()
    vectors = _row(latent)
    vectors = F.normalize(vectors, dim=-1) if unit else vectors
    quantized = quantizer.train()(vectors)
    entropies = affinity_entropy(
        vectors.flatten(0, 1),
        distance_affinities(quantizer.codebook),
        1 / config["inv_temperature"],
        floor="clamp",
    )
    entropy = entropies.loss(1.0, config["diversity_gamma"])
    loss = sum(quantized.losses.values(), torch.zeros(()))
    (quantized.latent.pow(3).sum() + loss + 0.1 * entropy).backward()
    return {
        "tokens": quantized.tokens.flatten(),
        "quantized": _row(quantized.latent),
        "codebook_loss": _pair(loss),
        "entropy_loss": _pair(entropy),
        "codebook_after": quantizer.codebook,
        "z_grad": latent.grad,
        "codebook_grad": quantizer.codebook.grad,
        "entropy_weight": torch.tensor([_entropy_weight(step) for step in (0, 1000, 5000, 9999, 10000, 20000)]),
    }


RUNNERS = {"titok-quantizer": titok, "sejal1d-quantizer": study}
