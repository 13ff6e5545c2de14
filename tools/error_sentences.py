"""The sentences with which smalti refuses something, read off the code, by module.

What a sentence fills in when it is said stands as `...`.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
RAISED = {"UserError", "UndecodableImageError", "PydanticCustomError", "ValueError"}


def sentences() -> dict[str, list[str]]:
    """All of them by module, `smalti.core.recipe`, in the order of the code."""
    found: dict[str, list[str]] = {}
    for path in sorted(ROOT.glob("packages/*/src/smalti/*/**/*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts[3:])
        own = [sentence for node in ast.walk(ast.parse(path.read_text())) if (sentence := _sentence(node))]
        if own:
            found[module] = list(dict.fromkeys(own))
    return found


def _sentence(node: ast.AST) -> str | None:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or node.func.id not in RAISED:
        return None
    index = 1 if node.func.id == "PydanticCustomError" else 0
    if len(node.args) <= index:
        return None
    text = re.sub(r"(\.\.\. ?)+$", "...", re.sub(r"(\.\.\.)+", "...", " ".join(_text(node.args[index]).split())))
    if node.func.id == "PydanticCustomError":
        text = re.sub(r"\{\w+\}", "...", text)
    return text if re.search(r"[a-z]{3,}.*\s.*[a-z]{2,}", text) else None


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return "..."
