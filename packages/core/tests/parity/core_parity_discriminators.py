"""Runners of the discriminators: weights of the originals under our names, then logits, gradients, statistics."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from core_parity_losses import llamagen_losses
from safetensors.torch import save_file
from torch import Tensor, nn

from smalti.core.discriminators.blur import Blur
from smalti.core.discriminators.dino import DINODiscriminator, DINODiscriminatorOptions
from smalti.core.discriminators.patchgan import PatchGANOptions
from smalti.core.discriminators.stylegan import StyleGANOptions
from smalti.core.discriminators.titok import TiTokDiscriminatorOptions
from smalti.core.training.adversarial import LeCamRegularization, discriminator_loss, generator_loss
from smalti.core.training.augmentation import blurred
from smalti.core.training.options import LeCam

Stages = dict[str, Tensor]
Case = dict[str, Any]

# Published names, as patterns, to ours; fixed kernels have none.
STYLEGAN_VT = (
    (r"convs\.0\.(.+)", r"first.0.\1"),
    (r"convs\.(\d+)\.conv1\.0\.(.+)", r"blocks.\1.main.0.\2"),
    (r"convs\.(\d+)\.conv2\.1\.(.+)", r"blocks.\1.main.3.\2"),
    (r"convs\.(\d+)\.skip\.1\.(.+)", r"blocks.\1.skip.1.\2"),
    (r"final_conv\.0\.(.+)", r"last.0.\1"),
    (r"final_linear\.(\d)\.(.+)", r"head.\1.\2"),
)
STYLEGAN_LLAMAGEN = (
    (r"blocks\.0\.(.+)", r"first.0.\1"),
    (r"blocks\.(\d+)\.conv_res\.(.+)", r"blocks.\1.skip.\2"),
    (r"blocks\.(\d+)\.net\.(\d)\.(.+)", r"blocks.\1.main.\2.\3"),
    (r"blocks\.(\d+)\.downsample\.1\.(.+)", r"blocks.\1.main.5.\2"),
    (r"final_conv\.0\.(.+)", r"last.0.\1"),
    (r"final_linear\.(\d)\.(.+)", r"head.\1.\2"),
)


def _renamed(tensors: dict[str, Tensor], patterns: tuple[tuple[str, str], ...], first: int) -> dict[str, Tensor]:
    """Tensors under our names; `blocks.{n}` of the published names begin with `first`."""
    found = {}
    for name, tensor in tensors.items():
        if name.rsplit(".", 1)[-1] in ("kernel", "f"):
            continue
        new = next(re.sub(old, ours, name) for old, ours in patterns if re.fullmatch(old, name))
        found[re.sub(r"^blocks\.(\d+)", lambda match: f"blocks.{int(match[1]) - first}", new)] = tensor
    return found


def _loaded(module: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
    module.load_state_dict(tensors)
    return module.eval()


def _gradient(module: nn.Module, image: Tensor, scale: float = 1.0) -> Tensor:
    image = image.clone().requires_grad_()
    (scale * module(image).sum()).backward()
    assert image.grad is not None
    return image.grad


def _titok(tensors: dict[str, Tensor], options: TiTokDiscriminatorOptions) -> nn.Module:
    found = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        match parts[0]:
            case "block_in":
                found[f"features.{name.removeprefix('block_in.')}"] = tensor
            case "blocks" if parts[-1] != "kernel":
                stage, layer = int(parts[1]), int(parts[2])
                found[f"features.{2 + 4 * stage + layer}.{parts[3]}"] = tensor
            case "to_logits":
                found[f"head.{name.removeprefix('to_logits.')}"] = tensor
    return _loaded(options.build(3), found)


def _of_kernel(tensors: dict[str, Tensor]) -> None:
    """The kernels in a published file are those that we make."""
    for name, tensor in tensors.items():
        if name.endswith(".kernel"):
            ours = Blur(tensor.shape[-1], padding=0).kernel
            torch.testing.assert_close(tensor.flatten(), ours.flatten())


def vistok(case: Case, parity: ModuleType) -> Stages:
    config = dict(case["config"])
    kind, params, train_mode = config.pop("class"), dict(config.pop("params")), config.pop("train_mode", False)
    assert not config, config
    tensors = parity.fill_state_dict(case["state_dict"], case["weight_seed"])
    _of_kernel(tensors)
    if kind == "PatchGANDiscriminator":
        assert params.pop("in_channels", 3) == 3
        options = PatchGANOptions(width=params.pop("dim", 64), layers=params.pop("n_layers", 3), init="default")
        names = {f"blocks.{name.removeprefix('seq.')}": tensor for name, tensor in tensors.items()}
        module = _loaded(options.build(3), names)
    elif kind == "StyleGANDiscriminator":
        stylegan = StyleGANOptions(
            image_size=params.pop("image_size"), width_multiplier=params.pop("channel_multiplier", 2)
        )
        module = _loaded(stylegan.build(3), _renamed(tensors, STYLEGAN_VT, 2))
    else:
        assert kind == "TitokGANDiscriminator", kind
        titok = TiTokDiscriminatorOptions(
            width=params.pop("hidden_channels", 128),
            stages=params.pop("num_stages", 3),
            pool=params.pop("blur_kernel_size", 4),
        )
        module = _titok(tensors, titok)
    assert not params, params
    if not case["outputs"]:
        return {}
    image = parity.fill_case_inputs(case)["image"]
    stylish = kind == "StyleGANDiscriminator"
    found = {}
    with torch.no_grad():
        logits = module(image)
        found["logits"] = torch.cat([logits.flatten(), torch.zeros(1)]) if stylish else logits
        if stylish:
            found["blur22"] = Blur(4, padding=2)(image)
            found["features"] = module.blocks(module.first(image))
            found["final_conv"] = module.last(found["features"])
        if train_mode:
            module.train()
            found["logits_train"] = module(image)
            norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
            found["running_mean_after"] = torch.cat([norm.running_mean for norm in norms])
            found["running_var_after"] = torch.cat([norm.running_var for norm in norms])
    # With the statistics that the call in training mode left.
    found["grad_image"] = _gradient(module.eval(), image, 10000.0 if stylish else 1.0)
    return found


def llamagen(case: Case, parity: ModuleType) -> Stages:
    config = dict(case["config"])
    assert config.pop("family") == "disc"
    tensors = parity.fill_state_dict(case["state_dict"], case["weight_seed"])
    if config.pop("disc_type") == "patchgan":
        options = PatchGANOptions(width=config.pop("ndf", 64), layers=config.pop("n_layers", 3))
        names = {f"blocks.{name.removeprefix('main.')}": tensor for name, tensor in tensors.items()}
        module = _loaded(options.build(3), names)
    else:
        stylegan = StyleGANOptions(image_size=config.pop("image_size"), block="strided-skip", width_multiplier=1)
        module = _loaded(stylegan.build(3), _renamed(tensors, STYLEGAN_LLAMAGEN, 2))
    assert not config, config
    inputs = parity.fill_case_inputs(case)
    with torch.no_grad():
        found = {"logits_eval": module(inputs["real"])}
        module.train()
        real = found["logits_train_real"] = module(inputs["real"])
        fake = found["logits_train_fake"] = module(inputs["fake"])
        found["losses"] = llamagen_losses(real, fake)
    return found


def titok(case: Case, parity: ModuleType) -> Stages:
    config = dict(case["config"])
    assert (config.pop("num_channels"), config.pop("leaky_slope"), config.pop("pool")) == (3, 0.1, [16, 16])
    assert (config.pop("group_norm_groups"), config.pop("group_norm_eps")) == (32, 1e-5)
    kernel = config.pop("blur_kernel_size")
    options = TiTokDiscriminatorOptions(
        width=config.pop("hidden_channels"),
        stages=config.pop("num_stages"),
        pool=kernel if config.pop("blur_resample") else "average",
    )
    assert not config, config
    tensors = parity.fill_state_dict(case["state_dict"], case["weight_seed"])
    _of_kernel(tensors)
    module = _titok(tensors, options)
    inputs = parity.fill_case_inputs(case)
    lecam = LeCamRegularization(LeCam(weight=1.0))
    lecam.averages = torch.tensor([0.3, -0.2])
    with torch.no_grad():
        real, fake = (module((inputs[name] + 1) / 2) for name in ("image", "other"))
        scalars = {
            "hinge": discriminator_loss(real, fake, "hinge"),
            "generator": generator_loss(fake, "hinge"),
            "lecam": lecam(real, fake),
        }
    doubled = {name: torch.stack([value, 2 * value]) for name, value in scalars.items()}
    return {"logits_real": real, "logits_fake": fake, **doubled}


def _dino(tensors: dict[str, Tensor], options: dict[str, Any]) -> DINODiscriminator:
    """DINO from a file of its own, the heads by name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dino.safetensors"
        save_file({name[5:]: tensor for name, tensor in tensors.items() if name.startswith("dino.")}, path)
        module = DINODiscriminatorOptions(source=str(path), **options).build(3)
    places = {"0.0": "first.0", "0.1": "first.1", "1.fn.0": "second.0", "1.fn.1": "second.1", "2": "last"}
    entries = {
        "weight_orig": "parametrizations.weight.original",
        "weight_u": "parametrizations.weight.0._u",
        "weight_v": "parametrizations.weight.0._v",
    }
    found = {}
    for name, tensor in tensors.items():
        if name.startswith("disc."):
            _, _, head, place, entry = re.fullmatch(r"(disc)\.(heads)\.(\d+)\.(.+)\.(\w+)", name).groups()
            found[f"heads.{head}.{places[place]}.{entries.get(entry, entry)}"] = tensor
    module.load_state_dict(found)
    return module.eval()


def dino(case: Case, parity: ModuleType) -> Stages:
    config = dict(case["config"])
    assert (config.pop("norm_type"), config.pop("spectral_norm"), config.pop("norm_eps")) == ("bn", True, 1e-6)
    config.pop("depth")  # read from the weights
    options = {
        "depths": tuple(block + 1 for block in config.pop("key_depths")),
        "kernel": config.pop("kernel_size"),
        "norm_group": config.pop("virtual_batch"),
    }
    assert not config, config
    module = _dino(parity.fill_state_dict(case["state_dict"], case["weight_seed"]), options)
    inputs = parity.fill_case_inputs(case)
    small, large = inputs["image224"], inputs["image256"]
    with torch.no_grad():
        found = {f"activation{n}": read for n, read in enumerate(module.features(small))}
        found["logits224"], found["logits256_resized"] = module(small), module(large)
        for stage in case["outputs"]:
            if stage.startswith("blur_schedule_"):
                found[stage] = blurred(large, float(stage.removeprefix("blur_schedule_")))
    return found


RUNNERS = {
    "vistok-disc-": vistok,
    "llamagen-patchgan": llamagen,
    "llamagen-stylegan-disc": llamagen,
    "titok-discriminator": titok,
    "xqgan-dinodisc": dino,
}
