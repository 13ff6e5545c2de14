"""What smalti.gaussian brings to the registry; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from smalti.core.plugins import Component, hookimpl


@hookimpl
def smalti_register() -> Iterator[Component]:
    """Name the components of this package."""
    yield Component(
        "tokenizer",
        "gaussiantoken",
        "smalti.gaussian.gaussiantoken.tokenizer:GaussianTokenizerOptions",
        "2-D Gaussians (GaussianToken)",
    )
    yield Component(
        "checkpoint", "gaussiantoken", "smalti.gaussian.gaussiantoken.checkpoint:GaussianTokenLayout", "GaussianToken"
    )
    yield Component("command", "fit", "smalti.gaussian.fitting.command:fit", "Fit one picture with 2-D Gaussians.")
