"""Pages of the reference that are made of the code: modules by package, commands, and options by dotted path.

The site's hook takes them from here when it is built, so they cannot be stale; `tests/docs/test_reference.py` looks for
gaps in them.
"""

from __future__ import annotations

import inspect
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from smalti.core.cli import app
from smalti.core.commands.evaluate import RECIPE
from smalti.core.commands.plugins import PluginCommand
from smalti.core.options import ComponentOptions, Slot
from smalti.core.plugins import KINDS, registry
from smalti.core.recipe import Recipe

sys.path.insert(0, str(Path(__file__).parent))
from error_sentences import sentences

ROOT = Path(__file__).parents[1]
PACKAGES = ("core", "quant", "gaussian", "generation", "eval")
# Kinds whose components are chosen by name with options of their own.
WITH_OPTIONS = tuple(kind for kind in KINDS if kind not in ("checkpoint", "command", "recipes", "zoo"))
# Compiled code: what it computes is told by its plain twins.
KERNELS = re.compile(r"(triton_\w+|numba_\w+)$")


def pages() -> dict[str, str]:
    """Markdown by path below the site's root."""
    return {
        **{page: modules_page(title, modules) for page, (title, modules) in rooms().items()},
        "reference/commands.md": commands_page(),
        "reference/recipes.md": recipes_page(),
        "reference/errors.md": errors_page(),
        **{f"reference/options-{kind}.md": components_page(kind) for kind in WITH_OPTIONS},
    }


def navigation() -> list[dict[str, Any]]:
    """The same pages as entries of the site's navigation."""
    packages = {
        f"smalti.{package}": [{title: page} for page, (title, _) in rooms().items() if title.split(".")[1] == package]
        for package in PACKAGES
    }
    return [
        {"Commands": "reference/commands.md"},
        {
            "Options": [
                {"Recipes": "reference/recipes.md"},
                *({kind: f"reference/options-{kind}.md"} for kind in WITH_OPTIONS),
            ]
        },
        *({name: entries} for name, entries in packages.items()),
        {"Errors": "reference/errors.md"},
    ]


def rooms() -> dict[str, tuple[str, list[str]]]:
    """The public modules: by page the name of a package or subpackage, and the modules that lie in it."""
    found: dict[str, list[str]] = {}
    for package in PACKAGES:
        source = ROOT / "packages" / package / "src"
        for path in sorted((source / "smalti" / package).rglob("*.py")):
            parts = path.relative_to(source).with_suffix("").parts
            if any(part.startswith("_") and part != "__init__" for part in parts) or KERNELS.match(parts[-1]):
                continue
            if parts[-1] == "__init__":
                found.setdefault(".".join(parts[:-1]), [])
            else:
                found.setdefault(".".join(parts[:-1]), []).append(".".join(parts))
    return {f"reference/{name.replace('.', '-')}.md": (name, modules) for name, modules in found.items() if modules}


def modules_page(title: str, modules: list[str]) -> str:
    """All modules of one package, one after the other."""
    return f"# {title}\n\n" + "\n".join(f"::: {module}\n" for module in modules)


def commands_page() -> str:
    """Every command with its arguments and options."""
    parts = [
        "# Commands",
        "`smalti COMMAND --help` says the same. `smalti --debug COMMAND` shows the traceback of a mistake. Exit codes: "
        "0; 1 where a check found something (`data check`, `plugins --check`, a variant of `compare` that failed); 2 "
        "for a mistake, with one sentence on standard error; 130 after Ctrl-C.",
    ]
    for name, command in commands().items():
        usage = [f"smalti {name}", "[OPTION]..."] + [_argument(each) for each in command.params if _is_argument(each)]
        parts += [f"## {name}", str(command.help or "").strip(), f"`{' '.join(usage)}`"]
        rows = [row for each in command.params if (row := _parameter(each))]
        if rows:
            parts.append(_table(["", "default", ""], rows))
    return "\n\n".join(parts) + "\n"


def commands() -> dict[str, Any]:
    """Every command by its words, those of plugins imported."""
    return dict(_commands(typer.main.get_command(app), ""))


def _commands(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    context = group.context_class(group, info_name=prefix or "smalti")
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command is None or " " in name:  # those of plugins within a group are met again there
            continue
        whole = f"{prefix} {name}".strip()
        if hasattr(command, "list_commands"):
            yield from _commands(command, whole)
        elif isinstance(command, PluginCommand):
            alone = typer.Typer(add_completion=False)
            alone.command()(registry().load("command", whole))
            yield whole, typer.main.get_command(alone)
        else:
            yield whole.removesuffix(f" {RECIPE}"), command


def _is_argument(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "argument")


def _argument(parameter: Any) -> str:
    name = str(parameter.metavar or parameter.name.upper())
    return (name if parameter.required else f"[{name}]") + ("..." if parameter.nargs == -1 else "")


def _parameter(parameter: Any) -> list[str]:
    if parameter.name == "help":
        return []
    names = _argument(parameter) if _is_argument(parameter) else ", ".join([*parameter.opts, *parameter.secondary_opts])
    shown = getattr(parameter, "show_default", None)
    default = shown if isinstance(shown, str) else "" if parameter.default in (None, "", False) else parameter.default
    required = "required" if parameter.required else str(default)
    return [f"`{names}`", required, str(parameter.help or "")]


def recipes_page() -> str:
    """Every option of a recipe by its dotted path, down to the components, which have pages of their own."""
    lead = (
        "Every option of a recipe, by the dotted path under which a command line changes it: `smalti run RECIPE "
        "train.tokenizer.steps=1000`. Values are YAML. An option that holds a component leads to the options of that "
        "kind; those continue the path: `tokenizer.quantizer.codebook_size=1024`."
    )
    return f"# Options of recipes\n\n{lead}\n\n" + _options_table(Recipe, "")


def components_page(kind: str) -> str:
    """The options of all components of a kind."""
    parts = [f"# Options of the kind {kind}"]
    for name in registry().names(kind):
        component = registry().component(kind, name)
        if component.target.startswith("smalti_example"):
            continue
        options = registry().options(kind, name)
        parts += [f"## {kind} {name}", f"{component.summary}. See [{options.__name__}][{_address(options)}]."]
        rows = _options_table(options, "")
        parts.append(rows or "It has no options.")
    return "\n\n".join(parts) + "\n"


def _address(options: type) -> str:
    return f"{options.__module__}.{options.__qualname__}"


def errors_page() -> str:
    """Every sentence with which something is refused, by module."""
    lead = "What is filled in stands as `...`; [troubleshooting](../troubleshooting.md) has cures."
    parts = [
        f"## {module}\n\n" + "\n".join(f"- `{sentence.replace('`', '')}`" for sentence in found)
        for module, found in sentences().items()
    ]
    return "\n\n".join(["# Errors", lead, *parts]) + "\n"


def options(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo, str]]:
    """Dotted path, field and description of every option of a model, nested models' after their own."""
    described = descriptions(model)
    for name, field in model.model_fields.items():
        if name == "name" and issubclass(model, ComponentOptions):
            continue
        path = f"{prefix}{name}"
        yield path, field, described.get(name, "chooses this form." if name == "name" else "")
        if _slot(field) is None:
            for nested in _models(field.annotation):
                if not issubclass(nested, ComponentOptions):
                    suffix = ".0." if typing.get_origin(field.annotation) is tuple else "."
                    yield from options(nested, f"{path}{suffix}")


def descriptions(model: type[BaseModel]) -> dict[str, str]:
    """What the docstrings of a model and of its bases say of its options, by name."""
    found: dict[str, str] = {}
    for ancestor in reversed(model.__mro__):
        section = re.search(r"^Args:\n((?:    .*\n?|\n)*)", inspect.cleandoc(ancestor.__doc__ or ""), re.MULTILINE)
        if section is None or ancestor is BaseModel:
            continue
        for entry in re.split(r"\n(?=    \w)", section[1].rstrip()):
            name, _, text = entry.strip().partition(":")
            found[name.strip()] = " ".join(text.split())
    return found


def _options_table(model: type[BaseModel], prefix: str) -> str:
    rows = [
        [f"`{path}`", _type(field), _default(field), text.replace("|", "\\|")]
        for path, field, text in options(model, prefix)
    ]
    return _table(["option", "value", "default", ""], rows) if rows else ""


def _slot(field: FieldInfo) -> Slot | None:
    return next((each for each in _annotations(field) if isinstance(each, Slot)), None)


def _annotations(field: FieldInfo) -> Iterator[Any]:
    """Annotations of a field, at whatever depth of its type they stand."""
    yield from field.metadata
    waiting = [field.annotation]
    while waiting:
        current = waiting.pop()
        if typing.get_origin(current) is Annotated:
            yield from typing.get_args(current)[1:]
        waiting += [each for each in typing.get_args(current) if typing.get_args(each)]


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models(argument)


def _type(field: FieldInfo) -> str:
    slot = _slot(field)
    if slot is not None:
        many = "several of the kind " if typing.get_origin(field.annotation) is tuple else "a component of the kind "
        return f"{many}[{slot.kind}](options-{slot.kind}.md)"
    return f"`{_shown(field.annotation, field)}`"


def _shown(annotation: Any, field: FieldInfo | None = None) -> str:
    """A type as a reader of YAML needs it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    limits = _limits(field.metadata if field else ())
    if origin is Annotated:
        return _shown(arguments[0]) + _limits(arguments[1:])
    if origin is typing.Literal:
        return " or ".join(map(str, arguments))
    if origin is tuple:
        inner = [_shown(each) for each in arguments if each is not Ellipsis]
        return f"[{', '.join(inner)}{', ...' if Ellipsis in arguments else ''}]{limits}"
    if origin is dict:
        return f"{{{_shown(arguments[0])}: {_shown(arguments[1])}}}"
    if arguments:
        return " or ".join("null" if each is type(None) else _shown(each) for each in arguments) + limits
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "{...}"
    return str(getattr(annotation, "__name__", annotation)) + limits


def _limits(metadata: Any) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    found = [
        f"{sign} {getattr(each, name)}"
        for item in metadata
        for each in (item.metadata if isinstance(item, FieldInfo) else [item])
        for name, sign in signs.items()
        if getattr(each, name, None) is not None
    ]
    return f" ({', '.join(found)})" if found else ""


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined and field.default_factory is None:
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, BaseModel):
        return ""
    text = {None: "null", True: "true", False: "false"}.get(value) if isinstance(value, bool | None) else str(value)
    if isinstance(value, tuple):
        text = str(list(value))
    return f"`{text}`" if text else "empty"


def _table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(' '.join(cell.split()) for cell in line)} |" for line in lines)
