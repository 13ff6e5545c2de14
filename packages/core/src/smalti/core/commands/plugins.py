"""Commands that plugins bring: listed from their record, imported when they run.

A command is a component of the kind `command`. Its target is a function with typer's annotations, like core's own:

    yield Component("command", "fit", "my_package.fit_command:fit", "Fit a picture.")
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

from smalti.core.errors import UserError
from smalti.core.plugins import PluginWarning, registry

KIND = "command"


class GroupWithPlugins(TyperGroup):
    """Core's own commands, and behind them those of the registry; one of core's is never replaced.

    Attributes:
        prefix: the words, with a space behind them, that the names of plugins' commands in this group begin with in
            the registry.
    """

    prefix: ClassVar[str] = ""

    def brought(self) -> list[str]:
        """The commands in this group that plugins bring, by their names here; those of groups in it are not."""
        names = (name.removeprefix(self.prefix) for name in registry().names(KIND) if name.startswith(self.prefix))
        return [name for name in names if " " not in name]

    def list_commands(self, ctx: Any) -> list[str]:
        """All names, core's first."""
        names = self.brought()
        for name in names:
            if name in self.commands:
                whole = f"{self.prefix}{name}"
                warnings.warn(
                    f"the command {whole!r} of a plugin is hidden by smalti's own", PluginWarning, stacklevel=2
                )
        return [*super().list_commands(ctx), *(name for name in names if name not in self.commands)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """One command; the registry is asked only for what core does not have."""
        command = super().get_command(ctx, cmd_name)
        if command is None and cmd_name in self.brought():
            return PluginCommand(f"{self.prefix}{cmd_name}", cmd_name)
        return command


class PluginCommand(TyperCommand):
    """Stands for a command until it runs, so that listing all of them imports none.

    Args:
        component: its name in the registry.
        name: what it is called in its group.
    """

    def __init__(self, component: str, name: str) -> None:
        self.component = component
        try:
            summary = registry().component(KIND, component).summary
        except UserError as error:  # two plugins claim the name: said in the list, raised where it is called
            summary = str(error)
        super().__init__(name, help=summary)

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Import the command, and go on as that."""
        alone = typer.Typer(add_completion=False)
        alone.command(self.name)(registry().load(KIND, self.component))
        return typer.main.get_command(alone).make_context(info_name, args, parent, **extra)
