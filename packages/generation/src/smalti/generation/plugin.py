"""What smalti.generation brings to the registry; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from smalti.core.plugins import Component, hookimpl


@hookimpl
def smalti_register() -> Iterator[Component]:
    """Name the components of this package."""
    yield Component(
        "generator",
        "ar",
        "smalti.generation.ar:AROptions",
        "autoregressive transformer, one token after the other (LlamaGen)",
    )
