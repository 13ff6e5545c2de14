"""The plugin of smalti.gaussian: it names no component, the package offers operators only; imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from smalti.core.plugins import Component, hookimpl


@hookimpl
def smalti_register() -> Iterable[Component]:
    """Name the components of this package: none, its operators are imported directly."""
    return ()
