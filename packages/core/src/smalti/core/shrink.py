"""A tiny copy of a recipe, with all its losses, discriminators and stages, to try it out on a CPU in seconds.

Sizes become small where they are only sizes; what makes a model what it is (its parts, factors, widths of codes, the
order of stages) stays. Pretrained networks become random ones, in files of the run, since anything but their values is
needed to run them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from smalti.core.checkpoints.zoo import zoo
from smalti.core.errors import UserError
from smalti.core.options import sentences
from smalti.core.published_tokenizer import PublishedTokenizerOptions
from smalti.core.random_networks import CODES, DEPTH, IMAGE_SIZE, TEXT_TOKENS, WIDTH, RandomNetworks, small_scales
from smalti.core.recipe import Recipe

Data = dict[str, Any]

BATCH = 4  # images of a micro-batch
BITS = 8
STEPS = 4
# Numbers that are sizes wherever they stand in the tokenizer, the generator or the evaluation: the largest allowed.
LARGEST = {
    **dict.fromkeys(("layers", "depth", "adapter_depth"), DEPTH),
    **dict.fromkeys(("dim", "width", "mlp_width", "ffn_dim", "text_width"), WIDTH),
    **dict.fromkeys(("heads", "adapter_heads", "blocks"), 1),
    **dict.fromkeys(("codebook_size", "codes"), CODES),
    **dict.fromkeys(("tokens", "latents"), 4),
    "gaussians": 8,
    "text_tokens": TEXT_TOKENS,
    **dict.fromkeys(("random_until", "raster_from"), 1),
}
# Updates at which something begins or ends: after the first one, so that both sides of it are seen.
MOMENTS = (
    *("start", "discriminator_start", "warmup_steps", "blur_until", "blur_fade"),
    *("anneal_from", "anneal_to", "scale_steps"),
)
# Shares of a batch, which a small batch would round to nothing.
SHARES = ("share", "dropout", "leave_out")


def shrunk(recipe: Recipe, folder: Path, say: Callable[[str], None]) -> Recipe:
    """The tiny copy, called `NAME-shrunk`.

    Args:
        recipe: whole.
        folder: where the weights of random networks go; those that are there are used.
        say: told what cannot be as in the recipe.

    Raises:
        UserError: the copy is no recipe, because a component that is not known here has sizes that belong together.
    """
    content: Data = recipe.model_dump(mode="json")
    random = RandomNetworks(folder, say)
    content["name"] += "-shrunk"
    content["checkpoint"], content["figures"] = None, None
    _data(content["data"], recipe, say)
    kind = "tokenizer" if recipe.tokenizer is not None else "autoencoder"
    if isinstance(recipe.tokenizer, PublishedTokenizerOptions):
        known = zoo().get(recipe.tokenizer.source)
        content[kind]["source"] = random.published(known.tokens if known else None)
        content[kind]["preprocessing"] |= {"image_size": IMAGE_SIZE, "channels": 3}
    else:
        _tokenizer(content[kind], random)
        _training(content["train"][kind], content[kind], random)
    if content["generator"] is not None:
        _capped(content["generator"])
    if content["train"]["generator"] is not None:
        _optimization(content["train"]["generator"])
        if (looks := content["train"]["generator"]["validation"]) is not None:
            looks |= {"every": 2, "images": BATCH, "batch_size": BATCH}
    for name, sizes in (
        ("tokenize", {"batch_size": 100}),
        ("sample", {"classes": [], "count": 20, "per_class": 0, "batch_size": 10}),
    ):
        if content[name] is not None:
            content[name].update(sizes)
    if content["tokenize"] is not None:
        content["tokenize"]["ten_crops"] = content["tokenize"]["ten_crops"][:1]
    if isinstance(classifier := (content["evaluate"] or {}).get("classifier"), dict):
        _optimization(_capped(classifier))
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{recipe.name} cannot be shrunk: {sentences(error)}") from None


def from_scratch(tokenizer: Data) -> Data:
    """Options of a tokenizer, as plain data, whose parts start from random weights instead of pretrained ones."""
    return {name: _unstarted(part) if isinstance(part, dict) else part for name, part in tokenizer.items()}


def _unstarted(part: Data) -> Data:
    name = part.get("name")
    if name == "pretrained-titok":
        return {key: value for key, value in part.items() if key not in ("weights", "start", "mean", "std")} | {
            "name": "titok"
        }
    start = {"latent-grid-vit": "pretrained", "timm": "weights"}.get(str(name))
    return part if start is None else {**part, start: None}


def _data(data: Data, recipe: Recipe, say: Callable[[str], None]) -> None:
    """Data sets that are not here become the smaller half of the one that comes with smalti."""
    for part in ("train", "validation"):
        options = getattr(recipe.data, part)
        try:
            options.build()
        except UserError:
            say(f"shrunk: data.{part}, {options.name}, is not here; Fashion-MNIST takes its place")
            data[part] = {"name": "webdataset", "shards": "embedded:fashion-mnist/validation-*.tar.gz"}


def _tokenizer(tokenizer: Data, random: RandomNetworks) -> None:
    preprocessing = tokenizer["preprocessing"]
    scale = min(1.0, IMAGE_SIZE / preprocessing["image_size"])
    preprocessing["image_size"] = round(scale * preprocessing["image_size"])
    if scale < 1 and preprocessing["fit"] == "pad":  # images that were small enough need not be so now
        preprocessing["fit"] = "center-crop"
    for part in ("encoder", "decoder"):
        if isinstance(tokenizer.get(part), dict):
            _network(tokenizer[part], scale, random)
    _capped(tokenizer.get("embed") or {})
    if isinstance(tokenizer.get("quantizer"), dict):
        _quantizer(tokenizer["quantizer"], tokenizer, scale)
    if tokenizer["name"] == "gaussiantoken" and "widths" in tokenizer["decoder"]:
        tokenizer["quantizer"]["dim"] = tokenizer["decoder"]["widths"][-1]  # what Gaussians carry is decoded


def _network(network: Data, scale: float, random: RandomNetworks) -> None:
    """An encoder or a decoder for images that are `scale` times as large as they were."""
    _capped(network)
    name = network["name"]
    if "widths" in network:
        network |= {"widths": [8] * len(network["widths"]), "groups": 4}
    if "multipliers" in network:
        multipliers = [min(multiplier, 2) for multiplier in network["multipliers"]]
        network |= {"multipliers": multipliers} | (
            {"channels": 32} if name == "token-cnn" else {"width": 8, "groups": 4}
        )
    if "image_size" in network:
        network["image_size"] = round(scale * network["image_size"])
    if isinstance(grid := network.get("grid"), list):
        network["grid"] = [max(1, round(side * scale)) for side in grid]
    elif isinstance(grid, int):
        network["grid"] = max(2, round(grid * scale))
    if network.get("pretrained") is not None:
        network["pretrained"] = random.vit(network["patch"])
    if name == "pretrained-titok":
        network["weights"] = random.vit(network["patch"])
    if name == "timm":
        network["weights"] = None
        random.tell(f"{network['model']} starts at random")
    if isinstance(head := network.get("head"), dict):
        _capped(head)
        if isinstance(head.get("decoder"), dict):
            _network(head["decoder"], scale, random)


def _quantizer(quantizer: Data, tokenizer: Data, scale: float) -> None:
    """The quantizer of a tokenizer for images that are `scale` times as large as they were."""
    for part in (quantizer, *_parts(quantizer)):
        if sum(part.get("bits", ())) > BITS:
            _fewer_bits(part, tokenizer)
        for name in ("codebook_size", "hidden"):
            if isinstance(part.get(name), int):
                part[name] = min(part[name], CODES)
        if isinstance(part.get("scales"), list):
            part["scales"] = small_scales(part["scales"], max(2, round(scale * max(part["scales"][-1]))))
        _moved(part)


def _fewer_bits(quantizer: Data, tokenizer: Data) -> None:
    """A bit is a channel of the latent: networks that end or begin with it have as many fewer."""
    old = sum(quantizer["bits"])
    quantizer["bits"] = [BITS]
    for part in ("encoder", "decoder"):
        widths = [name for name in ("latent_width", "code_width") if tokenizer[part].get(name) == old]
        tokenizer[part] |= dict.fromkeys(widths, BITS)


def _parts(quantizer: Data) -> list[Data]:
    """The quantizers within a quantizer."""
    inner = [quantizer.get("quantizer"), *(quantizer.get("quantizers") or [])]
    found = [part for part in inner if isinstance(part, dict)]
    return [*found, *(part for each in found for part in _parts(each))]


def _training(training: Data, tokenizer: Data, random: RandomNetworks) -> None:
    _optimization(training)
    start = training.get("start") or ()
    for source in dict.fromkeys([start] if isinstance(start, str) else [each["source"] for each in start]):
        random.tell(f"{source} has other sizes, training starts at random")
    training["start"] = None
    if (training.get("text") or {}).get("encoder") is not None:
        training["text"]["encoder"] = random.text_encoder()
    training["losses"] = [loss for loss in training["losses"] if _loss(loss, tokenizer, random)]
    for ramp in training["ramps"].values():
        ramp["steps"] = 1
    if (adversarial := training["adversarial"]) is not None:
        _moved(adversarial)
        _moved(adversarial["augment"] or {})
        _discriminator(adversarial["discriminator"], random)
    if (perturbation := training["perturbation"]) is not None:
        _moved(perturbation)
        perturbation["neighbours"] = min(perturbation["neighbours"], CODES // 8)
    if (validation := training.get("validation")) is not None:
        validation |= {"every": 2, "images": BATCH, "batch_size": BATCH, "features": None}


def _loss(loss: Data, tokenizer: Data, random: RandomNetworks) -> bool:
    """Shrink a loss; false if it has to be left out."""
    _moved(loss)
    if loss["name"] == "perceptual":
        random.tell(f"the loss perceptual is left out: {loss['network']} has no small size")
        return False
    if loss["name"] == "lpips":
        loss["vgg"], loss["heads"] = random.lpips()
    elif loss["name"] == "gram":
        loss["vgg"] = random.lpips()[0]
    elif loss["name"] == "alignment":
        patch = 16
        loss["teacher"] |= {"source": random.vit(patch), "image_size": IMAGE_SIZE, "patch_size": patch}
    elif loss["name"] == "proxy-codes":
        loss["tokenizer"] = random.tokenizer(tokenizer["decoder"]["grid"][0])
    return True


def _discriminator(discriminator: Data, random: RandomNetworks) -> None:
    if "source" in discriminator:
        depths = list(range(1, DEPTH + 1))
        discriminator |= {"source": random.vit(16), "image_size": IMAGE_SIZE, "depths": depths}
    elif "image_size" in discriminator:
        discriminator |= {"image_size": IMAGE_SIZE, "width_multiplier": 1}
    elif "width" in discriminator:
        discriminator["width"] = min(discriminator["width"], 32)


def _optimization(training: Data) -> Data:
    accumulate = min(training.get("accumulate", 1), 2)
    training |= {"steps": min(training["steps"], STEPS), "batch_size": BATCH * accumulate}
    # Half precision is slow on a CPU.
    values = {"accumulate": accumulate, "precision": "float32", "checkpoint_every": 2, "log_every": 1}
    training |= {name: value for name, value in values.items() if name in training}
    return _moved(training)


def _moved(part: Data) -> Data:
    """Moments and shares that fit a few updates of a few images."""
    for name in MOMENTS:
        if isinstance(part.get(name), int):
            part[name] = min(part[name], 1)
    for name in SHARES:
        if isinstance(part.get(name), float) and part[name] > 0:
            part[name] = 0.5
    return part


def _capped(part: Data) -> Data:
    for name, largest in LARGEST.items():
        if isinstance(part.get(name), int) and not isinstance(part[name], bool):
            part[name] = min(part[name], largest)
    return part
