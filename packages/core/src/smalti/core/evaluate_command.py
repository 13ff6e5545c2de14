"""The command group `evaluate`: a recipe's own stage, and beside it commands of plugins.

`smalti evaluate RECIPE` runs the stage. Plugins add commands to the group by a component of the kind `command` whose
name has two words, `evaluate images`. A recipe of such a name is written as a path, `./images`. A command may be
spelt as an option where it comes first: `--compare`.
"""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

from smalti.core.plugin_commands import KIND, PluginCommand
from smalti.core.plugins import registry

GROUP = "evaluate "
RECIPE = "recipe"


class EvaluateGroup(TyperGroup):
    """`evaluate`: what is not the name of a command is a recipe."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All names, core's own first."""
        return [*super().list_commands(ctx), *(name.removeprefix(GROUP) for name in _names())]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """One command, without importing it."""
        if f"{GROUP}{cmd_name}" in _names():
            return _Member(cmd_name)
        return super().get_command(ctx, cmd_name)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the name of the recipe's command in front where no command is named."""
        if args and f"{GROUP}{args[0].removeprefix('--')}" in _names():
            args = [args[0].removeprefix("--"), *args[1:]]
        elif args and args[0] != "--help" and self.get_command(ctx, args[0]) is None:
            args = [RECIPE, *args]
        return super().parse_args(ctx, args)


class _Member(PluginCommand):
    """A command of the group, which knows itself by its second word."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{GROUP}{name}")
        self.name = name

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Import the command, and go on as that."""
        return PluginCommand(f"{GROUP}{self.name}").make_context(info_name, args, parent, **extra)


def _names() -> list[str]:
    return [name for name in registry().names(KIND) if name.startswith(GROUP)]
