"""Runners of the cases about images: what lies between a file and a tokenizer."""

from __future__ import annotations

import io
import random
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from smalti.core.data.augmentation import RandomScaleCrop
from smalti.core.data.celeba import FACE
from smalti.core.data.decode import decode, decode_ten_crops
from smalti.core.data.geometry import resized
from smalti.core.data.images import to_uint8
from smalti.core.data.picture import read_picture
from smalti.core.options import Preprocessing

Case = dict[str, Any]


def _png(pixels: Tensor) -> bytes:
    """A PNG of pixels uint8 `(3, H, W)`."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def _normalised(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).float() / 127.5 - 1


def preprocess(case: Case, parity: ModuleType) -> dict[str, Tensor]:
    """visual-tokenizer-pytorch: centre crops, CelebA's crop, and the random crop of a seed."""
    images = {
        name: _png(((value[0] + 1) / 2 * 255).to(torch.uint8)) for name, value in parity.fill_case_inputs(case).items()
    }
    found = {
        f"center{size}": _normalised(decode(images["image"], Preprocessing(image_size=size))) for size in (64, 256)
    }
    face = decode(images["celeba"], Preprocessing(image_size=64, fit="bilinear-crop"), FACE)
    # Pillow's kernel is what the case was made with; training takes a quicker one.
    crop = RandomScaleCrop().apply(read_picture(images["image"], 3), 64, random.Random(7), resized)
    return {
        **found,
        "celeba64": _normalised(face),
        "random64_seed7": _normalised(np.ascontiguousarray(crop.transpose(2, 0, 1))),
    }


def pipeline(case: Case, parity: ModuleType) -> dict[str, Tensor]:
    """FQGAN and LlamaGen: crops before the tokenizer, bytes after it."""
    inputs, size = parity.fill_case_inputs(case), case["config"]["image_size"]
    images = {name: _png(((inputs[name][0] + 1) * 127.5).round().to(torch.uint8)) for name in ("large", "small")}
    preprocessing = Preprocessing(image_size=size)
    crops = {name: torch.from_numpy(decode(image, preprocessing)) for name, image in images.items()}
    ten = decode_ten_crops(images["small"], preprocessing, crop_range=case["config"]["crop_range"])
    decoded = inputs["decoded"]
    return {
        "center_crop_large": crops["large"].permute(1, 2, 0).long(),
        "center_crop_small": crops["small"].permute(1, 2, 0).long(),
        "ten_crop": torch.from_numpy(ten).permute(0, 2, 3, 1).long(),
        "normalized": _normalised(ten[0]),
        "to_uint8": to_uint8(1.1 * decoded).long(),
        "resized_eval": torch.nn.functional.interpolate(decoded, (size, size), mode="bicubic"),
    }


RUNNERS = {"vistok-preprocess": preprocess, "fqgan-image-pipeline": pipeline}
