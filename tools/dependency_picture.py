"""Draws docs/images/dependencies.svg: which part of smalti imports which, read off the imports themselves.

`python tools/dependency_picture.py` writes it; `tests/docs/test_architecture.py` fails where it is stale. Imports for
type checkers do not count. What rests on the contracts, everything, has no arrow to them.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "images" / "dependencies.svg"
CORE, BASE = "smalti.core", "contracts"


class Room(NamedTuple):
    """A box: its place, what it says, and for a part of core the modules and packages that it is made of."""

    left: int
    top: int
    width: int
    height: int
    says: str
    modules: str = ""


ROOMS = {
    "command line": Room(
        40, 60, 500, 56, "cli.py, one module for each group of commands",
        "cli commands",
    ),
    "pipeline": Room(
        130, 150, 320, 56, "recipes, run folders, stages, sampling",
        "pipeline stage stages run_folder recipe recipes sampling shrink "
        "class_names random_networks compare compare_report step_time reconstruct probe",
    ),
    "training": Room(
        160, 250, 170, 56, "loop, losses, discriminators", "training losses discriminators"
    ),
    "data": Room(40, 350, 130, 56, "images and tokens", "data assets"),
    "models": Room(
        225, 350, 155, 56, "networks, tokenizer",
        "backbones tokenizer autoencoder feature_prediction published_tokenizer text_encoder",
    ),
    "checkpoints": Room(420, 350, 120, 56, "published files, zoo", "checkpoints zoo"),
    BASE: Room(
        40, 450, 500, 56, "options, layouts, plugins, weights, noise, the contracts and their tests",
        "contracts options layout plugins plugin errors files weights noise distributed sampling_settings metrics "
        "codebook_health overrides progress testing captions frechet matmul",
    ),
}  # fmt: skip
SIBLINGS = {
    "smalti.eval": Room(640, 60, 240, 76, "figures, protocols, reports"),
    "smalti.generation": Room(640, 180, 240, 76, "AR, FAR, VAR, RAR, MaskGIT"),
    "smalti.gaussian": Room(640, 300, 240, 76, "rasterizer, fitting, GaussianToken"),
    "smalti.quant": Room(640, 420, 240, 76, "every quantizer"),
}


def arrows() -> dict[tuple[str, str], bool]:
    """Who imports whom; true where some import is at the top of a module, false where all wait for a call."""
    found: dict[tuple[str, str], bool] = {}
    for package in (CORE, *SIBLINGS):
        source = ROOT / "packages" / package.removeprefix("smalti.") / "src" / Path(*package.split("."))
        for path in sorted(source.rglob("*.py")):
            relative = path.relative_to(source).with_suffix("")
            if path.name == "__init__.py":
                continue
            here = _room(".".join((package, *relative.parts)))
            for name, at_once in _imports(ast.parse(path.read_text())):
                there = _room(name)
                if here != there:
                    found[here, there] = found.get((here, there), False) or at_once
    return found


def _imports(module: ast.Module) -> list[tuple[str, bool]]:
    """The modules of smalti that a module imports, and whether as soon as it is imported itself."""
    found = []
    waiting: list[tuple[ast.AST, bool]] = [(module, True)]
    while waiting:
        node, at_once = waiting.pop()
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("smalti."):
            base = str(node.module)
            found += [(f"{base}.{alias.name}" if base == CORE else base, at_once) for alias in node.names]
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        waiting += [(child, at_once and not inside) for child in ast.iter_child_nodes(node)]
    return found


def _room(module: str) -> str:
    package = ".".join(module.split(".")[:2])
    if package != CORE:
        return package
    first = module.split(".")[2]
    (room,) = [name for name, each in ROOMS.items() if first in each.modules.split()] or [None]
    assert room is not None, f"{module} is in no room of tools/dependency_picture.py: give it one"
    return room


def picture() -> str:
    """The picture as SVG."""
    found = arrows()
    siblings = [pair for pair in found if pair[0] in SIBLINGS and pair[1] in SIBLINGS]
    assert not siblings, f"packages beside core import each other: {siblings}"
    assert not [pair for pair in found if pair[0] in ROOMS and pair[1] in SIBLINGS], "core imports a package beside it"
    lines = [_line(*pair, at_once) for pair, at_once in sorted(found.items()) if pair[1] != BASE]
    drawn = [line for line in lines if line]
    boxes = [_box(name, room, "#dfe7ec" if name == BASE else "#ffffff") for name, room in ROOMS.items()]
    for name, room in SIBLINGS.items():
        used = [target for target in ROOMS if (name, target) in found]
        boxes.append(_box(name, room, "#f5efdf", f"on {', '.join(used)}"))
        middle = room.top + room.height // 2
        drawn.append(f'<path d="M640 {middle} H566" class="now"/>')
    return "\n".join([HEAD, *drawn, *boxes, "</svg>", ""])


HEAD = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 540" font-family="sans-serif" font-size="12">
<style>path{stroke:#55606a;fill:none;marker-end:url(#tip)}.later{stroke-dasharray:4 4}text{fill:#20282e}</style>
<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto-start-reverse">
<path d="M0 0L8 4L0 8z" style="fill:#55606a;stroke:none;marker-end:none"/></marker></defs>
<rect width="900" height="540" fill="#ffffff"/>
<rect x="20" y="20" width="540" height="506" rx="8" fill="#eef2f4" stroke="#9aa7b0"/>
<text x="40" y="44" font-weight="bold">smalti.core</text>"""
# Where arrows leave and arrive, as x of both, for rooms that do not lie straight above each other.
PATHS = {
    ("command line", "pipeline"): (290, 290),
    ("command line", "data"): (70, 70),
    ("command line", "checkpoints"): (500, 500),
    ("pipeline", "training"): (235, 235),
    ("training", "pipeline"): (265, 265),
    ("pipeline", "data"): (145, 145),
    ("pipeline", "models"): (355, 355),
    ("pipeline", "checkpoints"): (440, 440),
    ("training", "data"): (170, 130),
    ("training", "models"): (275, 275),
    ("models", "training"): (300, 300),
    ("training", "checkpoints"): (325, 425),
    (BASE, "checkpoints"): (480, 480),
}


def _line(here: str, there: str, at_once: bool) -> str:
    kind = "now" if at_once else "later"
    a, b = ROOMS.get(here), ROOMS.get(there)
    if a is None or b is None:
        return ""
    if a.top == b.top:
        side = 8 if a.left < b.left else -8
        start, end = (a.left + a.width, b.left) if side > 0 else (a.left, b.left + b.width)
        return f'<path d="M{start} {a.top + 28 + side} H{end}" class="{kind}"/>'
    assert (here, there) in PATHS, f"{here} imports {there}: give that arrow a path in tools/dependency_picture.py"
    start, end = PATHS[here, there]
    top, bottom = (a.top + a.height, b.top) if a.top < b.top else (a.top, b.top + b.height)
    return f'<path d="M{start} {top} L{end} {bottom}" class="{kind}"/>'


def _box(name: str, room: Room, fill: str, more: str = "") -> str:
    x, y = room.left + 10, room.top + 20
    lines = [
        f'<text x="{x}" y="{y}" font-weight="bold">{name}</text>',
        f'<text x="{x}" y="{y + 18}">{room.says}</text>',
    ]
    if more:
        halves = [more] if len(more) < 38 else _halves(more)
        lines += [f'<text x="{x}" y="{y + 34 + 14 * n}" font-size="11">{half}</text>' for n, half in enumerate(halves)]
    frame = f'<rect x="{room.left}" y="{room.top}" width="{room.width}" height="{room.height + 8 * bool(more)}" rx="6"'
    return f'{frame} fill="{fill}" stroke="#55606a"/>' + "".join(lines)


def _halves(text: str) -> list[str]:
    middle = text.rindex(" ", 0, 40)
    return [text[:middle], text[middle + 1 :]]


if __name__ == "__main__":
    PICTURE.write_text(picture())
