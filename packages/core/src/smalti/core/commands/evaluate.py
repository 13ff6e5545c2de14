"""The command group `evaluate`: a recipe's own stage, and beside it commands of plugins.

`smalti evaluate RECIPE` runs the stage. Plugins add commands to the group by a component of the kind `command` whose
name has two words, `evaluate images`. A recipe of such a name is written as a path, `./images`. A command may be
spelt as an option where it comes first: `--compare`.
"""

from __future__ import annotations

from typing import Any

from smalti.core.commands.plugins import GroupWithPlugins

RECIPE = "recipe"


class EvaluateGroup(GroupWithPlugins):
    """`evaluate`: what is not the name of a command is a recipe."""

    prefix = "evaluate "

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the name of the recipe's command in front where no command is named."""
        if args and args[0].removeprefix("--") in self.brought():
            args = [args[0].removeprefix("--"), *args[1:]]
        elif args and args[0] != "--help" and self.get_command(ctx, args[0]) is None:
            args = [RECIPE, *args]
        return super().parse_args(ctx, args)
