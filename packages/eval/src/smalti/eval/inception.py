"""Inception as FID uses it: images to pooled, spatial and class features.

Legend: B batch, H W pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from smalti.core.contracts import Features, check_pixels
from smalti.core.options import FeaturesOptions
from smalti.eval.inception_network import InceptionNetwork
from smalti.eval.inception_weights import SHA256_START, file_sha256, inception_weights, published_network
from smalti.eval.resize_for_inception import Resize, resized_for_inception

CPU_BATCH = 8  # images at once: more are no faster there, and take 20 MB each

Precision = Literal["float32", "float64", "bfloat16"]


class InceptionOptions(FeaturesOptions):
    """The Inception network of 2015, converted from TensorFlow by torch-fidelity.

    Args:
        weights: torch-fidelity's file; None takes the one in torch's cache, or fetches it there.
        resize: how images become 299 x 299 pixels, see `smalti.eval.resize_for_inception`.
        precision: of the network; bfloat16 is off by some thousandths and for screening only.
    """

    name: Literal["inception"] = "inception"
    weights: Path | None = None
    resize: Resize = "tensorflow"
    precision: Precision = "float32"

    def build(self) -> Inception:
        """Find and load the weights."""
        return Inception(self)


class Inception(Features):
    """Features `pool (B, 2048)`, `spatial (B, 2023)` of ADM's sFID, and `logits (B, 1008)` without bias, float32.

    In float32 they are within 1e-6 of torch-fidelity's, relative to the largest, in about half the time.

    Attributes:
        options: what it was built from.
        weights_sha256: of the file.
    """

    def __init__(self, options: InceptionOptions) -> None:
        super().__init__()
        path = inception_weights(options.weights)
        self.options = options
        self.weights_sha256 = file_sha256(path)
        published = published_network(path)
        self.dtype: torch.dtype = getattr(torch, options.precision)
        self.network = InceptionNetwork(published.double() if options.precision == "float64" else published)
        self.network.to(self.dtype)

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """Weights, resize and precision."""
        return f"{self.weights_sha256[:16]}-{self.options.resize}-{self.options.precision}"

    @property
    def published_weights(self) -> bool:
        """Whether the file is the one that everybody uses."""
        return self.weights_sha256.startswith(SHA256_START)

    @torch.inference_mode()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images uint8 `(B, H, W, 3)` of any size to the three features.

        Raises:
            UserError: images of another type or shape.
        """
        check_pixels(images)
        together = CPU_BATCH if images.device.type == "cpu" else max(len(images), 1)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # the default would keep ten bits of float32
            parts = [
                self.network(resized_for_inception(some, self.options.resize).to(self.dtype))
                for some in images.split(together)
            ]
        outputs = (torch.cat(values).float() for values in zip(*parts, strict=True))
        return dict(zip(("pool", "spatial", "logits"), outputs, strict=True))
