"""Linear probing: how well a linear layer tells classes apart by a frozen tokenizer's latents.

What the quantizer is given, before it is quantized, is averaged over its positions, as in XQ-GAN's evaluation; a
batch normalisation without weights and a linear layer are trained on that. Latents are computed once, of every image
and its mirror image, and kept in the output folder.

    features-train.safetensors, features-validation.safetensors   latents and labels
    probe.json                                                    the result

Legend: N images, V views (as stored, mirrored), D latent width, B batch, C channels, H W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from smalti.core.contracts import Quantizer, Tokenizer
from smalti.core.data.dataset import ImageDataset
from smalti.core.data.loader import read_images
from smalti.core.errors import UserError
from smalti.core.files import write_bytes, write_json
from smalti.core.noise import mixed_seed
from smalti.core.options import Options
from smalti.core.progress import Reporter
from smalti.core.recipe import DataSection
from smalti.core.weights import fingerprint

DEFINITION = (
    "share of validation images whose class is the first, or among the first five, of a linear layer on the latent "
    "before quantization, averaged over positions and normalised; the tokenizer is frozen"
)


class ProbeSettings(Options):
    """How the linear layer is trained.

    Args:
        epochs: passes over the training images.
        batch_size: B, latents of one update, and images encoded at once.
        learning_rate: of AdamW; a tenth after 60 % of the epochs, a hundredth after 90 %.
        weight_decay: of AdamW.
        seed: of weights, order and mirroring.
    """

    epochs: Annotated[int, Field(ge=1)] = 10
    batch_size: Annotated[int, Field(ge=1)] = 256
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    seed: Annotated[int, Field(ge=0)] = 0


class Latents(NamedTuple):
    """`latents` float32 `(N, V, D)`, `labels` int64 `(N,)`."""

    latents: Tensor
    labels: Tensor


def probe(
    tokenizer: Tokenizer,
    data: DataSection,
    folder: Path,
    settings: ProbeSettings,
    reporter: Reporter,
) -> dict[str, Any]:
    """Probe `tokenizer` and write the files of this module's head.

    Args:
        tokenizer: in evaluation mode, on its device.
        data: images to train on and to judge by.
        folder: where to; latents of the same tokenizer and images are taken from there.
        settings: of the linear layer.
        reporter: told how far it is.

    Returns:
        What `probe.json` holds: `top1` and `top5` (shares, 0 to 1), and how they came about.

    Raises:
        UserError: a tokenizer without a quantizer, images that cannot be read.
    """
    identity = fingerprint(tokenizer, tokenizer.config())
    parts = {}
    for name, options in (("train", data.train), ("validation", data.validation)):
        path = folder / f"features-{name}.safetensors"
        source = json.dumps([identity, options.model_dump(mode="json"), data.max_undecodable])
        found = _kept(path, source)
        if found is None:
            found = _computed(tokenizer, name, options.build(), data, settings.batch_size, reporter)
            tensors = {"latents": found.latents, "labels": found.labels}
            write_bytes(path, save(tensors, {"source": source}))
        parts[name] = found
    classes = int(torch.cat([part.labels for part in parts.values()]).max()) + 1
    layer = fit(parts["train"], classes, settings)
    top1, top5 = accuracy(layer, parts["validation"])
    result = {
        "top1": top1,
        "top5": top5,
        "definition": DEFINITION,
        "classes": classes,
        "images": {name: len(part.labels) for name, part in parts.items()},
        "latent_width": parts["train"].latents.shape[-1],
        "tokenizer": identity,
        "settings": settings.model_dump(mode="json"),
    }
    write_json(folder / "probe.json", result)
    return result


def fit(data: Latents, classes: int, settings: ProbeSettings) -> nn.Module:
    """Train the normalisation and the linear layer on the CPU; the same bits for the same seed."""
    count, views, width = data.latents.shape
    generator = torch.Generator().manual_seed(mixed_seed(settings.seed, "probe"))
    linear = nn.Linear(width, classes)
    nn.init.normal_(linear.weight, std=0.01, generator=generator)
    nn.init.zeros_(linear.bias)
    layer = nn.Sequential(nn.BatchNorm1d(width, eps=1e-6, affine=False), linear)
    optimizer = torch.optim.AdamW(
        layer.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    milestones = [round(share * settings.epochs) for share in (0.6, 0.9)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    for _ in range(settings.epochs):
        chosen = torch.randint(views, (count,), generator=generator)
        for indices in torch.randperm(count, generator=generator).split(settings.batch_size):
            if len(indices) == 1:  # which has no variance to normalise by
                continue
            loss = F.cross_entropy(layer(data.latents[indices, chosen[indices]]), data.labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return layer.eval()


@torch.no_grad()
def accuracy(layer: nn.Module, data: Latents) -> tuple[float, float]:
    """Top-1 and top-5 accuracy on images as stored, 0 to 1."""
    logits: Tensor = layer(data.latents[:, 0])
    best = logits.topk(min(5, logits.shape[1]), 1).indices == data.labels[:, None]
    return float(best[:, 0].double().mean()), float(best.any(1).double().mean())


def _kept(path: Path, source: str) -> Latents | None:
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("source") != source:
            return None
        return Latents(file.get_tensor("latents"), file.get_tensor("labels"))


@torch.no_grad()
def _computed(
    tokenizer: Tokenizer, name: str, images: ImageDataset, data: DataSection, batch_size: int, reporter: Reporter
) -> Latents:
    device = next((weight.device for weight in tokenizer.parameters()), torch.device("cpu"))
    latents: list[Tensor] = []
    labels: list[Tensor] = []
    with (
        _quantizer_inputs(tokenizer) as inputs,
        reporter.progress(f"{name} latents", len(images), unit="image") as tell,
    ):
        for batch in read_images(
            images,
            tokenizer.preprocessing,
            batch_size,
            max_undecodable=data.max_undecodable,
            warn=reporter.say,
            workers=data.workers,
        ):
            pixels = batch.images.to(device)
            for view in (pixels, pixels.flip(-1)):
                inputs.clear()
                tokenizer.encode(view)
                latents.append(inputs[0].flatten(1, -2).mean(1).float().cpu())
            labels.append(batch.labels)
            tell(len(pixels))
    if not labels:
        raise UserError(f"probe: {images.name} holds no image")
    pairs = [torch.stack(pair, 1) for pair in zip(latents[::2], latents[1::2], strict=True)]
    return Latents(torch.cat(pairs), torch.cat(labels))


@contextmanager
def _quantizer_inputs(tokenizer: Tokenizer) -> Iterator[list[Tensor]]:
    """What the tokenizer's quantizer is called with, `(B, *space, D)`."""
    quantizer = getattr(tokenizer, "quantizer", None)
    if not isinstance(quantizer, Quantizer):
        raise UserError(f"probe: {type(tokenizer).__name__} has no quantizer whose input could be probed")
    inputs: list[Tensor] = []
    hook = quantizer.register_forward_pre_hook(lambda _module, arguments: inputs.append(arguments[0]))
    try:
        yield inputs
    finally:
        hook.remove()
