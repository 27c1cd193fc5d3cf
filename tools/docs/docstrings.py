"""A check that the documented arguments of functions and classes exist."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

_SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example|Examples|Note):$")
_ITEM = re.compile(r"^ {4}(\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: \([^)]*\))?:(?: |$)")
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def documented(docstring: str, section: str = "Args") -> list[str]:
    """The names that a section of a Google-style docstring explains; one line may explain several."""
    names: list[str] = []
    inside = False
    for line in docstring.splitlines():
        if line and not line.startswith(" "):
            heading = _SECTION.match(line)
            inside = heading is not None and heading[1] == section
        elif inside and (item := _ITEM.match(line)):
            names += [name.strip("* ") for name in item[1].split(",")]
    return names


def _arguments(function: _Function) -> set[str]:
    given = function.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return {argument.arg for argument in every if argument is not None}


def _accepted(node: _Function | ast.ClassDef) -> set[str] | None:
    """The arguments of a function or of a class; None where a base class may have others."""
    if not isinstance(node, ast.ClassDef):
        return _arguments(node)
    for member in node.body:
        if isinstance(member, _Function) and member.name == "__init__":
            return _arguments(member)
    if node.bases:
        return None
    return {
        part.target.id for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
    }


def problems(path: Path) -> Iterator[str]:
    """One sentence for every argument that a docstring of a module explains and the signature does not have."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, _Function | ast.ClassDef):
            continue
        accepted = _accepted(node)
        for name in documented(ast.get_docstring(node) or ""):
            if accepted is not None and name not in accepted:
                yield f"{path}:{node.lineno}: the docstring of {node.name} explains {name}, which it does not take"
