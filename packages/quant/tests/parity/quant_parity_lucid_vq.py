"""How the cases of `VectorQuantize` of vector-quantize-pytorch are run on ours."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.core.contracts import Quantizer
from smalti.quant.alternated import fit_codes
from smalti.quant.ema import EmaStatistics
from smalti.quant.estimators import scaled_gradient
from smalti.quant.masked import quantize_masked
from smalti.quant.orthogonal import diversity_loss, orthogonal_loss
from smalti.quant.product import ProductOptions
from smalti.quant.projected import ProjectedOptions
from smalti.quant.vector import VectorQuantizer, VectorQuantizerOptions

Stages = dict[str, Tensor]


def pair(value: Tensor | float) -> Tensor:
    """Cases store a scalar followed by 0."""
    return torch.tensor([torch.as_tensor(value).item(), 0.0])


def known(given: dict[str, Any], **defaults: Any) -> dict[str, Any]:
    """`given` over `defaults`; a key that is not among them is one that a runner does not understand."""
    unknown = given.keys() - defaults.keys()
    assert not unknown, f"options that no runner understands: {sorted(unknown)}"
    return defaults | given


def _fixed(given: dict[str, Any], **values: Any) -> None:
    """Options that are understood at one value only."""
    for name, value in values.items():
        assert given[name] == value, f"no runner understands {name} = {given[name]!r}"


LUCID = {
    "dim": None,
    "codebook_size": None,
    "codebook_dim": None,
    "heads": 1,
    "separate_codebook_per_head": False,
    "layernorm_after_project_in": False,
    "decay": 0.8,
    "eps": 1e-5,
    "use_cosine_sim": False,
    "threshold_ema_dead_code": 0,
    "commitment_weight": 1.0,
    "commitment_use_cross_entropy_loss": False,
    "orthogonal_reg_weight": 0.0,
    "orthogonal_reg_active_codes_only": False,
    "orthogonal_reg_max_codes": None,
    "codebook_diversity_loss_weight": 0.0,
    "codebook_diversity_temperature": 100.0,
    "rotation_trick": True,
    "directional_reparam": False,
    "directional_reparam_variance": 5e-3,
    "learnable_codebook": False,
    "ema_update": True,
    "sync_update_v": 0.0,
    "in_place_codebook_optimizer": None,
    "affine_param": False,
    "affine_param_batch_decay": 0.99,
    "affine_param_codebook_decay": 0.9,
    "stochastic_sample_codes": False,
    "straight_through": False,
    "sample_codebook_temp": 1.0,
    "kmeans_init": False,
    "kmeans_iters": 10,
    "sync_kmeans": True,
    "sync_codebook": False,
    "sync_affine_param": False,
    "vq_bridge": None,
    "manual_ema_update": False,
    "manual_in_place_optimizer_update": False,
    "freeze_codebook": False,
    "route_gradients_to_input": True,
    "accept_3d_fmap": False,
    "channel_last": True,
    "accept_image_fmap": False,
    "return_zeros_for_masked_padding": True,
}


class Lucid:
    """`VectorQuantize` of vector-quantize-pytorch, with its options made of ours.

    Args:
        given: its options.
        state: its state dict.
        masked: whether it gets a mask in training.
    """

    def __init__(self, given: dict[str, Any], state: dict[str, Tensor], *, masked: bool = False) -> None:
        self.params = params = known(given, **LUCID)
        _fixed(
            params,
            eps=1e-5,
            stochastic_sample_codes=False,
            straight_through=False,
            kmeans_init=False,
            vq_bridge=None,
            manual_ema_update=False,
            manual_in_place_optimizer_update=False,
            route_gradients_to_input=True,
            accept_3d_fmap=False,
        )
        if params["freeze_codebook"]:
            params |= {"ema_update": False, "threshold_ema_dead_code": 0}
        self.state = state
        width = params["codebook_dim"] or params["dim"]
        estimator = "rotation" if params["rotation_trick"] else "straight-through"
        if params["directional_reparam"]:
            # It turns the other losses and the averages off.
            params |= {"learnable_codebook": True, "ema_update": False, "commitment_weight": 0.0}
            params |= {"threshold_ema_dead_code": 0}
            estimator = "diveq"
        # Where tokens are masked, unit codes are pulled to the raw tokens there; ours compares like with like.
        self.raw = params["use_cosine_sim"] and masked
        elsewhere = self.raw or params["commitment_use_cross_entropy_loss"]
        weight = 0.0 if elsewhere else params["commitment_weight"]
        options: Any = VectorQuantizerOptions(
            dim=width,
            codebook_size=params["codebook_size"],
            cosine=params["use_cosine_sim"],
            update="ema" if params["ema_update"] else "loss",
            estimator=estimator,
            diveq_variance=params["directional_reparam_variance"],
            commitment_weight=weight,
            codebook_weight=weight if params["learnable_codebook"] else 0.0,
            ema_decay=params["decay"],
            affine=params["affine_param"],
            revive_below=params["threshold_ema_dead_code"] or None,
        )
        if params["heads"] > 1:
            shared = not params["separate_codebook_per_head"]
            options = ProductOptions(quantizers=(options,), branches=params["heads"], shared=shared)
        if width * params["heads"] != params["dim"]:
            options = ProjectedOptions(
                dim=params["dim"], quantizer=options, layer_norm=params["layernorm_after_project_in"]
            )
        self.quantizer: Quantizer = options.build()
        self.units = [module for module in self.quantizer.modules() if isinstance(module, VectorQuantizer)]
        self.seen: list[tuple[Tensor, Tensor]] = []  # what every unit got and made of it
        for unit in self.units:
            unit.register_forward_hook(lambda _, args, result: self.seen.append((args[0], result.tokens)))
            if params["affine_param"]:
                unit.learning.affine.batch_decay = params["affine_param_batch_decay"]
                unit.learning.affine.codebook_decay = params["affine_param_codebook_decay"]
        with torch.no_grad():
            self._load()
        # Where averages move no codes, DiVeQ keeps the statistics going all the same.
        self.idle = [EmaStatistics(sums, params["decay"]) for sums in self.state["_codebook.embed_avg"]]
        for statistics, counts in zip(self.idle, self.state["_codebook.cluster_size"], strict=True):
            statistics.counts.copy_(counts)

    def _load(self) -> None:
        embed = self.state["_codebook.embed"]
        if self.params["use_cosine_sim"]:
            embed = F.normalize(embed, dim=-1)
        for head, unit in enumerate(self.units):
            unit.codebook.copy_(embed[head])
            if self.params["ema_update"]:
                unit.learning.ema.counts.copy_(self.state["_codebook.cluster_size"][head])
                unit.learning.ema.sums.copy_(self.state["_codebook.embed_avg"][head])
        ours = dict(self.quantizer.named_parameters())
        for key, value in self.state.items():
            if not key.startswith("_codebook."):
                ours[self.our_name(key)].copy_(value)

    def our_name(self, key: str) -> str:
        layer_norm = self.params["layernorm_after_project_in"]
        if layer_norm:
            key = key.replace("project_in.0", "project_in").replace("project_in.1", "layer_norm")
        return key

    def channel_last(self, latent: Tensor) -> Tensor:
        return latent.movedim(1, -1) if self._channel_first() else latent

    def as_given(self, latent: Tensor) -> Tensor:
        return latent.movedim(-1, 1) if self._channel_first() else latent

    def _channel_first(self) -> bool:
        return self.params["accept_image_fmap"] or not self.params["channel_last"]

    def tokens(self, tokens: Tensor, latent: Tensor) -> Tensor:
        """Tokens `(B, L, S)` as the original gives them."""
        streams = [] if tokens.shape[-1] == 1 else [tokens.shape[-1]]
        return tokens.view(len(latent), *self.channel_last(latent).shape[1:-1], *streams)

    def unit_input(self, given: Tensor) -> Tensor:
        """What the only unit gets of a channel-last latent."""
        training = self.quantizer.training
        self.seen.clear()
        with torch.no_grad():
            self.quantizer.eval()(given)
        self.quantizer.train(training)
        ((seen, _),) = self.seen
        return seen

    def scores(self, unit: VectorQuantizer, latent: Tensor, before: Tensor) -> Tensor:
        """Minus the distances, or the cosines, from the codes `before` the update.

        There the averages overwrite the codes that the backward pass has yet to read: the gradient is the one at
        the codes after the update.
        """
        after = unit.codebook.detach().clone()
        moved = after - before
        with torch.no_grad():
            unit.codebook.copy_(before)
        distances = unit.distances(latent)
        with torch.no_grad():
            unit.codebook.copy_(after)
        flat = F.normalize(latent, dim=-1) if self.params["use_cosine_sim"] else latent
        distances = distances - 2 * (flat - flat.detach()) @ moved.t()
        distances = distances + 2 * ((unit.codebook - unit.codebook.detach()) * moved).sum(-1)
        return 1 - distances / 2 if self.params["use_cosine_sim"] else -distances.clamp(min=1e-8).sqrt()

    def forward(self, latent: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Stages]:
        """Output and tokens as the original gives them, and the parts of its loss, unweighted."""
        params, given = self.params, self.channel_last(latent)
        parts = dict.fromkeys(("commitment", "codebook_diversity", "orthogonal_reg", "inplace_optimize"), _zero())
        if params["in_place_codebook_optimizer"] is not None and self.quantizer.training:
            (unit,) = self.units
            optimizer = torch.optim.SGD([unit.codebook], lr=params["in_place_codebook_optimizer"])
            parts["inplace_optimize"] = fit_codes(unit, self.unit_input(given), optimizer)
        self.seen.clear()
        before = [unit.codebook.detach().clone() for unit in self.units]
        quantized = self.quantizer(given) if mask is None else quantize_masked(self.quantizer, given, mask)
        output = quantized.latent
        if mask is not None and not params["return_zeros_for_masked_padding"]:
            output = torch.where(mask[..., None], output, given)
        if not self.quantizer.training:
            return self.as_given(output), self.tokens(quantized.tokens, latent), parts
        self.losses = quantized.losses
        if params["directional_reparam"]:
            for statistics, (seen, tokens) in zip(self.idle, self.seen, strict=True):
                statistics.update(tokens.flatten(), seen.detach().flatten(0, -2))
        if params["commitment_weight"]:
            parts["commitment"] = quantized.losses["commitment"] / params["commitment_weight"]
        if params["sync_update_v"]:
            output = scaled_gradient(output, 1 + params["sync_update_v"])
        if self.raw:
            parts["commitment"] = F.mse_loss(quantized.latent[mask].detach(), given[mask])
        if params["commitment_use_cross_entropy_loss"] or params["codebook_diversity_loss_weight"]:
            scores = [
                self.scores(unit, seen, codes)
                for unit, (seen, _), codes in zip(self.units, self.seen, before, strict=True)
            ]
            if params["commitment_use_cross_entropy_loss"]:
                terms = [
                    F.cross_entropy(score.flatten(0, 1), tokens.flatten())
                    for score, (_, tokens) in zip(scores, self.seen, strict=True)
                ]
                parts["commitment"] = torch.stack(terms).mean()
            if params["codebook_diversity_loss_weight"]:
                terms = [diversity_loss(-score, 1 / params["codebook_diversity_temperature"]) for score in scores]
                parts["codebook_diversity"] = torch.stack(terms).mean()
        if params["orthogonal_reg_weight"]:
            codebooks = [unit.codebook.clone() for unit in self.units]
            if params["orthogonal_reg_active_codes_only"]:
                (codebook,) = codebooks
                codebooks = [codebook[quantized.tokens.unique()]]
            largest = params["orthogonal_reg_max_codes"]
            assert largest is None or len(codebooks[0]) <= largest, "a random subset of the codes"
            parts["orthogonal_reg"] = orthogonal_loss(torch.stack(codebooks))
        return self.as_given(output), self.tokens(quantized.tokens, latent), parts

    def total(self, parts: Stages) -> Tensor:
        params = self.params
        return (
            params["commitment_weight"] * parts["commitment"]
            + params["codebook_diversity_loss_weight"] * parts["codebook_diversity"]
            + params["orthogonal_reg_weight"] * parts["orthogonal_reg"]
        )

    def statistics(self, step: int) -> Stages:
        embed = torch.stack([unit.codebook.detach().clone() for unit in self.units])
        kept = [unit.learning.ema for unit in self.units] if self.params["ema_update"] else self.idle
        counts = torch.stack([statistics.counts.clone() for statistics in kept])
        sums = torch.stack([statistics.sums.clone() for statistics in kept])
        return {f"embed_after{step}": embed, f"cluster_size_after{step}": counts, f"embed_avg_after{step}": sums}


def _zero() -> Tensor:
    return torch.zeros(())


def _of(case: dict[str, Any], parity: ModuleType) -> Lucid:
    state = parity.fill_state_dict(case["state_dict"], case["weight_seed"])
    return Lucid(case["config"]["params"], state, masked="mask" in case["inputs"])


def lucid(case: dict[str, Any], parity: ModuleType) -> Stages:
    """VectorQuantize of vector-quantize-pytorch: evaluation, decoding, and training steps."""
    config = known(case["config"], params=None, steps=1, decode=False, latent_scale=1.0)
    system, inputs = _of(case, parity), parity.fill_case_inputs(case)
    quantizer = system.quantizer
    latent = inputs["latent"] * config["latent_scale"]
    mask = inputs["mask"].bool() if "mask" in inputs else None
    if system.params["affine_param"]:
        # There evaluation moves the statistics of tokens, too, but not those of the codebook; ours moves none.
        (unit,) = system.units
        unit.learning.affine.observe(system.unit_input(system.channel_last(latent)).flatten(0, -2), unit.codebook)
        mean, variance = unit.learning.affine.codebook_mean.clone(), unit.learning.affine.codebook_variance.clone()
        unit.learning.affine.codebook_mean.fill_(0)
        unit.learning.affine.codebook_variance.fill_(1)
    output, tokens, _ = _evaluated(system, latent, mask)
    if system.params["affine_param"]:
        unit.learning.affine.codebook_mean.copy_(mean)
        unit.learning.affine.codebook_variance.copy_(variance)
    stages: Stages = {"eval_quantized": output, "eval_indices": tokens}
    if config["decode"]:
        space = tuple(system.channel_last(latent).shape[1:-1])
        streams = tokens.reshape(len(latent), -1, len(quantizer.vocab))
        stages["decode"] = system.as_given(quantizer.decode(streams.clamp(min=0), space))

    if system.params["orthogonal_reg_weight"]:
        for unit in system.units:
            unit.codebook.requires_grad_()  # although averages overwrite it
    quantizer.train()
    for step in range(1, config["steps"] + 1):
        step_latent = (latent * 1.25 ** (step - 1)).requires_grad_()
        output, tokens, parts = system.forward(step_latent, mask)
        if step == 1:
            total = system.total(parts)
            pulled = system.losses.get("codebook", _zero())
            ((output * inputs["probe"]).sum() + total + pulled).backward()
            stages |= {"train_quantized": output, "train_indices": tokens, "grad_latent": step_latent.grad}
            stages |= {f"part_{name}": pair(part) for name, part in parts.items()}
            stages["train_loss"] = pair(total)
            stages |= _gradients(system)
        stages |= system.statistics(step)
    return {name: value.detach() for name, value in stages.items()}


def _evaluated(system: Lucid, latent: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Stages]:
    system.quantizer.eval()
    with torch.no_grad():
        return system.forward(latent, mask)


def _gradients(system: Lucid) -> Stages:
    found = {}
    ours = dict(system.quantizer.named_parameters())
    for key in system.state:
        if not key.startswith("_codebook."):
            found["grad_" + key.replace(".", "_")] = ours[system.our_name(key)].grad
    codebooks = [unit.codebook.grad for unit in system.units]
    if all(gradient is not None for gradient in codebooks):
        found["grad_codebook_embed"] = torch.stack(codebooks)
    return found


def lucid_topk(case: dict[str, Any], parity: ModuleType) -> Stages:
    """The k nearest codes, in evaluation."""
    config = known(case["config"], params=None, topk=None, latent_scale=0.12)
    system = _of(case, parity)
    latent = system.channel_last(parity.fill_case_inputs(case)["latent"] * config["latent_scale"])
    (unit,) = system.units
    with torch.no_grad():
        tokens = unit.eval().distances(latent).topk(config["topk"], largest=False).indices
        codes = torch.stack([unit.decode(nth[..., None], latent.shape[1:-1]) for nth in tokens.unbind(-1)], -2)
    errors = (codes - latent[..., None, :]).square().mean(-1)
    return {"quantized": codes, "indices": tokens, "loss": system.params["commitment_weight"] * errors}
