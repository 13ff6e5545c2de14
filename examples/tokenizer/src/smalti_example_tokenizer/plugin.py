"""What this distribution brings to smalti; imports no torch."""

from collections.abc import Iterator

from smalti.core.plugins import Component, hookimpl


@hookimpl
def smalti_register() -> Iterator[Component]:
    """Name the tokenizer."""
    target = "smalti_example_tokenizer.patches:PatchOptions"
    yield Component("tokenizer", "example-patches", target, "one token per patch, an MLP on each side")
