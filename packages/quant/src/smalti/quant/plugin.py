"""What smalti.quant brings to the registry; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from smalti.core.plugins import Component, hookimpl


@hookimpl
def smalti_register() -> Iterator[Component]:
    """Name the components of this package."""
    yield Component(
        "quantizer",
        "vq",
        "smalti.quant.vector:VectorQuantizerOptions",
        "vector quantization: nearest code of a learned codebook, Euclidean or cosine",
    )
