"""Named protocols: all that a figure depends on beside the images themselves."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from smalti.core.errors import UserError
from smalti.core.options import FeaturesOptions, Options, Preprocessing, Slot, sentences
from smalti.core.overrides import apply_override


class Protocol(Options):
    """How images become figures.

    Args:
        name: what results call it.
        summary: whose figures it reproduces.
        extractor: the network, with its resize and precision.
        preprocessing: of the images on both sides; None leaves them as they are.
        metrics: what is measured unless others are named, see `smalti.eval.measures`.
        inception_score: parts of shuffled samples as in torch-fidelity, or of 5000 consecutive ones as in ADM.
        neighbours: k of precision and recall.
        distances: of precision and recall; float16 is ADM's rounding.
        batch_size: images whose error makes one PSNR, for `psnr-pooled` only.
        images: the count of samples that published figures have.
        seed: of all draws.
    """

    name: str
    summary: str
    extractor: Annotated[FeaturesOptions, Slot("features")]
    preprocessing: Preprocessing | None = None
    metrics: tuple[str, ...]
    inception_score: Literal["torch-fidelity", "adm"] = "torch-fidelity"
    neighbours: Annotated[int, Field(ge=1)] = 3
    distances: Literal["float32", "float16"] = "float32"
    batch_size: Annotated[int, Field(ge=1)] = 64
    images: Annotated[int, Field(ge=1)] = 50_000
    seed: Annotated[int, Field(ge=0)] = 2020


def _inception(resize: str) -> dict[str, str]:
    return {"name": "inception", "resize": resize}


PROTOCOLS: dict[str, dict[str, Any]] = {
    "adm": {
        "summary": "ADM's evaluator (Dhariwal and Nichol 2021): gFID of ImageNet against its reference batches",
        "extractor": _inception("tensorflow"),
        "metrics": ("fid", "sfid", "is", "precision-recall"),
        "inception_score": "adm",
        "distances": "float16",
    },
    "torch-fidelity": {
        "summary": "torch-fidelity: folders as they are",
        "extractor": _inception("tensorflow"),
        "metrics": ("fid", "is", "kid"),
    },
    "clean": {
        "summary": "clean-fid (Parmar et al. 2022): antialiased resize",
        "extractor": _inception("clean"),
        "metrics": ("fid", "kid"),
    },
    "pytorch-fid": {
        "summary": "pytorch-fid: torch's bilinear resize",
        "extractor": _inception("pytorch"),
        "metrics": ("fid",),
    },
    "rfid-imagenet-val": {
        "summary": "rFID of tokenizers: the 50,000 validation images of ImageNet, ADM's centre crop on both sides",
        "extractor": _inception("tensorflow"),
        "preprocessing": {"image_size": 256, "fit": "center-crop"},
        "metrics": ("fid", "is", "psnr", "ssim"),
    },
    "gaussiantoken": {
        "summary": "GaussianToken's evaluation: centre crop without resizing, pooled PSNR, SSIM with a flat window",
        "extractor": _inception("pytorch"),
        "preprocessing": {"image_size": 256, "fit": "native-crop"},
        "metrics": ("fid", "psnr-pooled", "ssim-uniform"),
    },
    "dinov2": {
        "summary": "Stein et al. 2023: distances in DINOv2's features",
        "extractor": {"name": "dinov2"},
        "metrics": ("fd", "precision-recall", "density-coverage"),
    },
    "classifier": {
        "summary": "samples of classes, judged by the classifier that a run trained on its own images",
        "extractor": {"name": "classifier"},
        "metrics": ("accuracy", "fd", "class-fd"),
    },
    "cmmd": {
        "summary": "CMMD (Jayasumana et al. 2024): maximum mean discrepancy in CLIP's features",
        "extractor": {"name": "clip"},
        "metrics": ("cmmd",),
        "images": 30_000,
    },
}


def protocol(name: str, changes: Sequence[str] = ()) -> Protocol:
    """A protocol by name, with changes such as `extractor.precision=bfloat16`, which become part of its name.

    Raises:
        UserError: no such protocol, or a change that it cannot take.
    """
    if name not in PROTOCOLS:
        raise UserError(f"unknown protocol {name!r}; there are {', '.join(PROTOCOLS)}")
    # The place of the weights does not change a figure; their hash stands in the result.
    told = [change for change in changes if not change.startswith("extractor.weights=")]
    content = {**deepcopy(PROTOCOLS[name]), "name": f"{name} with {', '.join(told)}" if told else name}
    for change in changes:
        apply_override(content, change)
    try:
        return Protocol.model_validate(content)
    except ValidationError as error:
        raise UserError(f"protocol {name}: {sentences(error)}") from None
