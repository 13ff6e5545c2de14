"""Plugins: who brings which components, loaded on first need and each in isolation.

A plugin is a module named by an entry point of the group `smalti`. It implements one hook,

    @hookimpl
    def smalti_register():
        yield Component("quantizer", "fsq", "my_package.fsq:FSQOptions", "finite scalar quantization")

and must not import torch: the target is imported when the component is used. A plugin that fails to load
is a warning and a line in `smalti plugins`, never the end of the host.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from typing import Any

import pluggy

from smalti.core.errors import UserError

PROJECT = "smalti"
ENVIRONMENT = "SMALTI_PLUGINS"
KINDS = (
    "encoder",
    "decoder",
    "quantizer",
    "tokenizer",
    "autoencoder",
    "generator",
    "loss",
    "discriminator",
    "dataset",
    "features",
    "metric",
    "checkpoint",
    "stage",
    "command",
    "recipes",
    "zoo",
)

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@dataclass(frozen=True)
class Component:
    """One thing that a plugin brings.

    Args:
        kind: one of `KINDS`.
        name: unique within its kind; what recipes and commands call it.
        target: `module:attribute`, imported on use: the options class; for the kind `command` a function with
            typer's annotations; for the kinds `recipes` and `zoo` a module whose folder holds YAML files.
        summary: one line for `smalti plugins`.
    """

    kind: str
    name: str
    target: str
    summary: str


@hookspec
def smalti_register() -> Iterable[Component]:  # type: ignore[empty-body]
    """Yield the components of this plugin. Must be cheap: no torch import."""


@dataclass
class Plugin:
    """A plugin that is installed, with what came of loading it."""

    name: str
    distribution: str
    version: str
    status: str = "found"
    error: str | None = None
    components: list[Component] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}"


class PluginWarning(UserWarning):
    """A plugin could not be loaded, or something of it is hidden; the rest works."""


class Registry:
    """All components of all installed plugins."""

    def __init__(self, selection: str = "") -> None:
        """Nothing is loaded yet.

        Args:
            selection: comma-separated plugin names: `a,b` takes only these, `-a` leaves one out.
        """
        chosen = [name.strip() for name in selection.split(",") if name.strip()]
        self._only = {name for name in chosen if not name.startswith("-")}
        self._blocked = {name[1:] for name in chosen if name.startswith("-")}
        self._plugins: list[Plugin] | None = None

    def plugins(self) -> list[Plugin]:
        """Every installed plugin, loaded where that works; status is `loaded`, `failed` or `blocked`."""
        if self._plugins is None:
            self._plugins = list(self._load())
        return self._plugins

    def _load(self) -> Iterator[Plugin]:
        manager = pluggy.PluginManager(PROJECT)
        manager.add_hookspecs(importlib.import_module(__name__))
        for entry in sorted(metadata.entry_points(group=PROJECT), key=lambda entry: entry.name):
            distribution = entry.dist
            plugin = Plugin(
                entry.name,
                distribution.name if distribution else entry.value,
                distribution.version if distribution else "unknown",
            )
            if entry.name in self._blocked or (self._only and entry.name not in self._only):
                plugin.status = "blocked"
                yield plugin
                continue
            # A plugin is foreign code: whatever it raises is its own failure and must not end the host.
            try:
                plugin.components = _components(manager, entry)
                plugin.status = "loaded"
            except Exception as error:  # noqa: BLE001
                plugin.status = "failed"
                plugin.error = f"{type(error).__name__}: {error}"
                warnings.warn(
                    f"plugin {plugin.name!r} of {plugin} could not be loaded ({plugin.error}); "
                    f"{ENVIRONMENT}=-{plugin.name} silences this",
                    PluginWarning,
                    stacklevel=2,
                )
            yield plugin

    def _found(self, kind: str) -> dict[str, list[tuple[Plugin, Component]]]:
        found: dict[str, list[tuple[Plugin, Component]]] = {}
        for plugin in self.plugins():
            for component in plugin.components:
                if component.kind == kind:
                    found.setdefault(component.name, []).append((plugin, component))
        return found

    def names(self, kind: str) -> list[str]:
        """The names installed for a kind, sorted."""
        return sorted(self._found(kind))

    def component(self, kind: str, name: str) -> Component:
        """The record of one component.

        Raises:
            UserError: an unknown name (says what is installed), or one that two distributions claim.
        """
        found = self._found(kind)
        if name not in found:
            failed = [f"{plugin.name!r} of {plugin} failed to load" for plugin in self.plugins() if plugin.error]
            raise UserError(
                f"unknown {kind} {name!r}; installed: {', '.join(sorted(found)) or 'none'}"
                + (f" (plugin {'; '.join(failed)})" if failed else "")
            )
        if len(found[name]) > 1:
            owners = " and ".join(str(plugin) for plugin, _ in found[name])
            raise UserError(f"{kind} {name!r} is registered twice, by {owners}: uninstall or block one of them")
        return found[name][0][1]

    def load(self, kind: str, name: str) -> Any:
        """Import the target of one component.

        Raises:
            UserError: unknown name, or the target cannot be imported (says which distribution is broken).
        """
        component = self.component(kind, name)
        module, _, attribute = component.target.partition(":")
        try:
            target = importlib.import_module(module)
            return getattr(target, attribute) if attribute else target
        except (ImportError, AttributeError) as error:
            owner = self._found(kind)[name][0][0]
            raise UserError(
                f"{kind} {name!r} of {owner} cannot be imported from {component.target}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def options(self, kind: str, name: str) -> Any:
        """The options class of one component."""
        return self.load(kind, name)

    def duplicates(self) -> list[str]:
        """A sentence for every name that two distributions claim."""
        sentences = []
        for kind in KINDS:
            for name, owners in self._found(kind).items():
                if len(owners) > 1:
                    sentences.append(f"{kind} {name!r}: " + " and ".join(str(plugin) for plugin, _ in owners))
        return sentences


def _components(manager: pluggy.PluginManager, entry: metadata.EntryPoint) -> list[Component]:
    module = entry.load()
    manager.register(module, entry.name)
    others = [plugin for plugin in manager.get_plugins() if plugin is not module]
    results = manager.subset_hook_caller("smalti_register", others)()
    components = [component for result in results for component in result]
    for component in components:
        if not isinstance(component, Component):
            raise TypeError(f"smalti_register yields Component records, got {component!r}")
        if component.kind not in KINDS:
            raise ValueError(f"unknown kind {component.kind!r} of {component.name!r}; there are {', '.join(KINDS)}")
    return components


@cache
def registry() -> Registry:
    """The registry of this process; `SMALTI_PLUGINS=a,b` limits it, `-a` blocks."""
    return Registry(os.environ.get(ENVIRONMENT, ""))
