"""Runners of the losses between images and of the objectives: LPIPS, perceptual, adversarial, contrastive.

Scalars are stored followed by 0 or by twice themselves; `_pair` makes the former, `_double` the latter.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from smalti.core.contracts import TokenizerOutput
from smalti.core.discriminators.patchgan import PatchGAN, PatchGANOptions
from smalti.core.losses.contrastive import contrastive
from smalti.core.losses.dependency import DependencyOptions
from smalti.core.losses.lpips import LPIPS, LPIPSOptions
from smalti.core.losses.perceptual import Perceptual, PerceptualOptions
from smalti.core.losses.pixel import L1Options
from smalti.core.losses.proxy_codes import proxy_cross_entropy
from smalti.core.training.adversarial import (
    LeCamRegularization,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from smalti.core.training.options import LeCam

Stages = dict[str, Tensor]
Case = dict[str, Any]


def _pair(value: Tensor | float) -> Tensor:
    return _vector(value, 0.0)


def _double(value: Tensor | float) -> Tensor:
    return _vector(value, 2 * value)


def _vector(*values: Tensor | float) -> Tensor:
    return torch.stack([torch.as_tensor(value, dtype=torch.float64).detach() for value in values])


def _output(images: Tensor) -> TokenizerOutput:
    return TokenizerOutput(images, torch.zeros(len(images), 1, 1, dtype=torch.int64), {})


def _lpips(tensors: dict[str, Tensor], prefix: str = "") -> LPIPS:
    """Built from a file in the layout of LPIPS."""
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lpips.safetensors"
        save_file(own, path)
        return LPIPSOptions(vgg=path, heads=path).build()


def _distance(lpips: LPIPS, first: Tensor, second: Tensor) -> Tensor:
    return lpips.distance(first, second).view(-1, 1, 1, 1)


def _perceptual(tensors: dict[str, Tensor], network: str, prefix: str) -> Perceptual:
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        save_file(own, path)
        return PerceptualOptions(network=network, weights=path).build()


def _patchgan(tensors: dict[str, Tensor], prefix: str, **options: Any) -> PatchGAN:
    module = PatchGANOptions(**options).build(3)
    module.load_state_dict(
        {f"blocks.{name.removeprefix(prefix)}": tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    )
    return module


def vistok_adversarial(case: Case, parity: ModuleType) -> Stages:
    assert not case["config"], case["config"]
    inputs = parity.fill_case_inputs(case)
    fake, real = inputs["fake_logits"], inputs["real_logits"] + 0.4
    later_fake, later_real = 0.5 * fake + 1, real - 0.5

    def calls(weight: float, decay: float) -> tuple[LeCamRegularization, list[Tensor]]:
        lecam = LeCamRegularization(LeCam(weight=weight, decay=decay))
        pairs = ((real, fake), (later_real, later_fake))
        return lecam, [discriminator_loss(*pair, "hinge") + weight * lecam(*pair) for pair in pairs]

    lecam, (first, second) = calls(0.001, 0.999)
    _, (_, other) = calls(1.0, 0.9)
    last = inputs["last_layer"].clone().requires_grad_()
    y = F.conv2d(inputs["features"], last)
    weight = adaptive_weight((y - inputs["target"]).abs().mean(), -y.square().mean(), last, 1e4)
    return {
        "g_ns": _pair(generator_loss(fake, "non-saturating")),
        "d_ns": _pair(discriminator_loss(real, fake, "vanilla")),
        "g_hinge": _pair(generator_loss(fake, "hinge")),
        "d_hinge": _pair(discriminator_loss(real, fake, "hinge")),
        "d_hinge_lecam_call1": _pair(first),
        "d_hinge_lecam_call2": _pair(second),
        "lecam_ema_after": lecam.averages,
        "d_hinge_lecam1_decay09_call2": _pair(other),
        "adaptive_weight": _pair(weight),
    }


def seedvoken_adversarial(case: Case, parity: ModuleType) -> Stages:
    assert not case["config"], case["config"]
    inputs = parity.fill_case_inputs(case)
    fake, real = inputs["fake_logits"], inputs["real_logits"] + 0.4
    lecam = LeCamRegularization(LeCam(weight=1.0, of="patches", update="before"))
    means = [logits.flatten(1).mean(1) for logits in (real, fake)]
    return {
        "g_ns": _pair(generator_loss(means[1], "non-saturating")),
        "d_hinge": _pair(discriminator_loss(real, fake, "hinge")),
        "d_vanilla": _pair(discriminator_loss(real, fake, "vanilla")),
        # Without the half that all other objectives have.
        "d_ns": _pair(2 * discriminator_loss(*means, "vanilla")),
        "lecam1": _pair(lecam(real, fake)),
        "lecam2": _pair(lecam(real - 0.5, 0.5 * fake + 1)),
        "lecam_ema": lecam.averages,
    }


def _exchanged(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """The "non-saturating" objectives of LlamaGen: prediction and target of the cross entropy exchanged, a defect."""

    def entropy(target: float, logits: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(torch.full_like(logits, target), logits)

    return 0.5 * (entropy(1.0, real) + entropy(0.0, fake)), entropy(1.0, fake)


def llamagen_losses(real: Tensor, fake: Tensor) -> Tensor:
    """The vector of the discriminator cases."""
    exchanged = _exchanged(real, fake)
    return _vector(
        discriminator_loss(real, fake, "hinge"),
        discriminator_loss(real, fake, "vanilla"),
        exchanged[0],
        generator_loss(fake, "hinge"),
        exchanged[1],
    )


def xqgan_losses(case: Case, parity: ModuleType) -> Stages:
    inputs = parity.fill_case_inputs(case)
    real, fake = inputs["real"], inputs["fake"]
    exchanged = _exchanged(real, fake)
    config = dict(case["config"])
    lecam = LeCamRegularization(LeCam(weight=1.0, decay=config.pop("lecam_decay"), of="patches", update="before"))
    assert not config, config
    for k in range(3):
        lecam((k + 1) * real + 0.5, (k + 1) * fake - 0.5)
    averages = lecam.averages.clone()
    # The term is for the state as it is then, so its own update comes after.
    still = LeCamRegularization(LeCam(weight=1.0, of="patches", update="after"))
    still.averages = averages
    first, second = inputs["feature_a"], inputs["feature_b"]
    unit = [F.normalize(features, dim=-1) for features in (first, second)]
    latent = torch.cat([first, second], dim=-1)[:, None]
    dependency = DependencyOptions(branches=2).build()
    output = TokenizerOutput(torch.zeros(0), torch.zeros(0), {}, {"latent": latent})
    return {
        "discriminator_losses": _vector(
            discriminator_loss(real, fake, "hinge"), discriminator_loss(real, fake, "vanilla"), exchanged[0]
        ),
        "generator_losses": _vector(generator_loss(fake, "hinge"), exchanged[1]),
        "lecam": _vector(0.0, *averages, still(real, fake)),
        "contrastive": _vector(
            0.0, contrastive(first, second), contrastive(*unit, 50.5), dependency(output, torch.zeros(0), 0)
        ),
        "adopt_weight": _vector(*(0.5 if step >= 100 else 0.0 for step in (0, 99, 100, 500))),
    }


def lpips(case: Case, parity: ModuleType) -> Stages:
    assert case["config"] in ({}, {"family": "lpips"}), case["config"]
    inputs = parity.fill_case_inputs(case)
    loss = _lpips(parity.fill_state_dict(case["state_dict"], case["weight_seed"]))
    first, second = inputs.values()
    first = first.requires_grad_()
    distance = _distance(loss, first, second)
    distance.sum().backward()
    return {"distance": distance, "grad_image": first.grad}


def perceptual(case: Case, parity: ModuleType) -> Stages:
    config = dict(case["config"])
    tensors = parity.fill_state_dict(case["state_dict"], case["weight_seed"])
    loss = _perceptual(tensors, config.pop("model_name"), "model.")
    assert not config, config
    inputs = parity.fill_case_inputs(case)
    image = inputs["image"].requires_grad_()
    value = loss(_output(image), inputs["other"], 0)
    (1000 * value).backward()
    return {
        "resized": loss.prepared(image),
        "logits": loss.logits(image),
        "loss": _pair(value),
        "grad_image": image.grad,
    }


def titok_perceptual(case: Case, parity: ModuleType) -> Stages:
    name = case["config"]["model_name"]
    assert case["config"].keys() == {"model_name"}, case["config"]
    mix = re.fullmatch(r"lpips-(convnext_s|resnet50)-([\d.]+)-([\d.]+)", name)
    assert mix is not None, name
    network, of_lpips, of_network = mix[1], float(mix[2]), float(mix[3])
    tensors = parity.fill_state_dict(case["state_dict"], case["weight_seed"])
    (prefix,) = {key.split(".")[0] + "." for key in tensors if not key.startswith(("lpips.", "imagenet_"))}
    distance = _lpips(tensors, "lpips.")
    classifier = _perceptual(tensors, network, prefix)
    inputs = parity.fill_case_inputs(case)
    with torch.no_grad():
        per_image = distance.distance(inputs["image"], inputs["other"])
        scalar = classifier(_output(inputs["image"]), inputs["other"], 0)
        mixed = (of_lpips * per_image + of_network * scalar) / (of_lpips + of_network)
    return {"losses": _vector(*per_image, scalar, *mixed)}


def mask_ratios() -> Stages:
    """The mask schedules of MaskGIT's training at eleven shares of the way."""
    share = torch.linspace(0, 1, 11)
    return {
        "ratio_root": 1 - share.sqrt(),
        "ratio_square": 1 - share.square(),
        "ratio_cosine": torch.cos(share * torch.pi / 2),
        "ratio_arccos": torch.arccos(share) / (torch.pi / 2),
        "ratio_linear": 1 - share,
    }


def titok_losses(case: Case, parity: ModuleType) -> Stages:
    config = dict(case["config"])
    smoothing, unmasked = config.pop("label_smoothing"), config.pop("loss_weight_unmasked_token")
    quantizer_weight = config.pop("quantizer_weight")
    assert not config, config
    inputs = parity.fill_case_inputs(case)
    masked = inputs["maskval"] > 0
    weights = masked + unmasked * ~masked
    entropy = F.cross_entropy(
        inputs["logits"].transpose(1, 2), inputs["targets"], label_smoothing=smoothing, reduction="none"
    )
    stage1 = proxy_cross_entropy(inputs["pixel_logits"].flatten(2).transpose(1, 2), inputs["proxy"])
    return {
        "mlm_loss": _double((entropy * weights).sum() / (weights.sum() + 1e-8)),
        "stage1_loss": _double(stage1 + quantizer_weight * 0.25),
        **mask_ratios(),
    }


def gaussiantoken_losses(case: Case, parity: ModuleType) -> Stages:
    config = dict(case["config"])
    weight, lecam_weight = config.pop("gen_loss_weight"), config.pop("lecam_loss_weight")
    commitment = 0.37 * config.pop("commit_weight")
    disc_weight = config.pop("disc_weight")
    assert not config.pop("disc_conditional")
    assert (config.pop("disc_in_channels"), config.pop("disc_start_epoch"), config.pop("gan_start_epoch")) == (3, 0, 5)
    assert not config, config
    tensors = parity.fill_state_dict(case["state_dict"], case["weight_seed"])
    inputs = parity.fill_case_inputs(case)
    image = inputs["image"]
    shares = torch.tensor([0.05, 0.2, 0.6, 1.0]).view(-1, 1, 1, 1)
    reconstruction = (image + shares * (inputs["noise"] - image)).requires_grad_()
    distance = _lpips(tensors, "loss.perceptual_loss.")
    l1 = L1Options().build()

    def fresh() -> PatchGAN:
        return _patchgan(tensors, "loss.discriminator.main.")

    def nll(made: Tensor) -> Tensor:
        return l1(_output(made), image, 0) + distance(_output(made), image, 0)

    def gan(network: nn.Module, made: Tensor) -> Tensor:
        return generator_loss(network(made).flatten(1).mean(1), "non-saturating")

    network = fresh().train()
    value = nll(reconstruction)
    term = gan(network, reconstruction)
    total = value + weight * term + commitment
    (gradient,) = torch.autograd.grad(total, reconstruction)
    real, fake = network(image), network(reconstruction.detach())
    lecam = LeCamRegularization(LeCam(weight=lecam_weight, of="patches", update="before"))
    hinge = discriminator_loss(real, fake, "hinge")
    regularization = lecam(real, fake)
    disc = hinge + lecam_weight * regularization
    disc.backward()
    others = {}
    for objective in ("vanilla", "non_saturate"):
        again = fresh().train()
        gan(again, reconstruction)
        r, f = again(image), again(reconstruction.detach())
        if objective == "vanilla":
            loss = discriminator_loss(r, f, "vanilla")
        else:
            loss = 2 * discriminator_loss(*(logits.flatten(1).mean(1) for logits in (r, f)), "vanilla")
        own = LeCamRegularization(LeCam(weight=lecam_weight, of="patches", update="before"))
        others[objective] = loss + lecam_weight * own(r, f)
    last = inputs["last_layer"].clone().requires_grad_()
    again = fresh().train()
    made = F.conv2d(reconstruction.detach(), last)
    made_nll, made_gan = nll(made), gan(again, made)
    norms = [torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (made_nll, made_gan)]
    norm = network.blocks[3]
    return {
        "lpips": _distance(distance, image, reconstruction),
        "logits_eval": fresh().eval()(image),
        "logits_train": fresh().train()(image),
        "grad_reconstruction": gradient,
        "grad_disc_first": network.blocks[0].weight.grad,
        "bn_mean_after": norm.running_mean,
        "bn_var_after": norm.running_var,
        "lecam_ema": _vector(*lecam.averages, lecam.options.decay),
        "scalars": _vector(
            value + commitment,
            value,
            l1(_output(reconstruction), image, 0),
            distance(_output(reconstruction), image, 0),
            total,
            weight * term,
            disc,
            regularization,
            hinge,
            real.mean(),
            fake.mean(),
            others["vanilla"],
            others["non_saturate"],
        ),
        "adaptive": _vector(*norms, disc_weight * adaptive_weight(made_nll, made_gan, last, 1e4)),
    }


def sejal1d_loss(case: Case, parity: ModuleType) -> Stages:
    config = dict(case["config"])
    adaptive, objective, l2_weight = (
        config.pop(key) for key in ("adaptive_disc_weight", "disc_loss", "l2_loss_weight")
    )
    start, weight = config.pop("disc_start"), config.pop("disc_weight")
    codebook, entropy = config.pop("codebook_weight"), config.pop("entropy_loss_weight")
    perceptual_weight, l1_weight = config.pop("perceptual_weight"), config.pop("l1_loss_weight")
    layers, width = config.pop("disc_num_layers"), config.pop("disc_ndf")
    assert not config, config
    assert 5 < start <= 20
    tensors = parity.fill_state_dict(case["state_dict"], case["weight_seed"])
    inputs = parity.fill_case_inputs(case)
    image = inputs["image"]
    kernel = parity.fill_tensor("last.weight", [3, 8, 3, 3], "float32", case["weight_seed"]).requires_grad_()
    made = torch.tanh(F.conv2d(inputs["hidden"], kernel, padding=1))
    distance = _lpips(tensors, "perceptual_loss.")
    (prefix,) = {key.split("main.")[0] + "main." for key in tensors if "main." in key}
    network = _patchgan(tensors, prefix, layers=layers, width=width).eval()
    perceptual = distance(_output(made), image, 0)
    nll = l1_weight * F.l1_loss(made, image) + l2_weight * F.mse_loss(made, image) + perceptual_weight * perceptual
    generator = generator_loss(network(made), "hinge")
    factor = weight * (adaptive_weight(nll, generator, kernel, 1e4) if adaptive else 1.0)
    others = codebook * 0.3 - entropy * 2.0
    return {
        "nll_loss": _double(nll),
        "p_loss": _double(perceptual),
        "g_loss": _double(generator),
        "d_weight": _double(factor),
        "total_after_start": _double(nll + factor * generator + others),
        "total_before_start": _double(nll + others),
        "disc_loss": _double(discriminator_loss(network(image), network(made), objective)),
    }


RUNNERS = {
    "vistok-loss-adversarial": vistok_adversarial,
    "vistok-loss-lpips": lpips,
    "vistok-loss-perceptual": perceptual,
    "llamagen-lpips": lpips,
    "quant-seedvoken-adversarial": seedvoken_adversarial,
    "xqgan-losses": xqgan_losses,
    "titok-perceptual": titok_perceptual,
    "titok-losses": titok_losses,
    "gaussiantoken-losses": gaussiantoken_losses,
    "sejal1d-loss": sejal1d_loss,
}
