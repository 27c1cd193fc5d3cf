"""The API reference of a package: its public names, then its modules. It is read from source; nothing is imported."""

import ast
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Module:
    """A module of a package: its dotted name, its path and its syntax tree."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def summary(self) -> str:
        """The first paragraph of its docstring, on one line."""
        return " ".join((ast.get_docstring(self.tree) or "").split("\n\n")[0].split())

    @property
    def names(self) -> set[str]:
        """The public functions and classes that it defines, which the reference shows."""
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        return {node.name for node in self.tree.body if isinstance(node, kinds) and not node.name.startswith("_")}


def modules(root: Path, package: str) -> list[Module]:
    """All modules of a distribution, packages before their modules.

    Private ones, ``__main__`` and those of the command line are left out: ``--help`` describes these.
    """
    source = root / "packages" / package / "src"
    found = []
    for path in source.glob("**/*.py"):
        parts = list(path.relative_to(source).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        if not any(part.startswith(("_", "cli")) for part in parts):
            found.append(Module(".".join(parts), path, ast.parse(path.read_text(encoding="utf-8"))))
    return sorted(found, key=lambda module: module.name.split("."))


def public_names(face: Module) -> dict[str, str]:
    """The names of a package's ``__all__``, each with the module that defines it.

    A package's ``__init__`` declares them twice: in imports for type checkers and in ``lazy_names`` for Python. This
    function reads the imports.

    Raises:
        ValueError: a name of ``__all__`` is not imported.
    """
    origins, exported = {}, []
    for node in ast.walk(face.tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            origins.update({alias.asname or alias.name: node.module for alias in node.names})
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            exported = ast.literal_eval(node.value)
    lost = [name for name in exported if name not in origins]
    if lost:
        raise ValueError(f"{face.path} exports {', '.join(lost)}, which it imports from no module")
    return {name: origins[name] for name in exported}


def _block(name: str, level: int, **options: str) -> str:
    lines = [f"::: {name}", "    options:", f"      heading_level: {level}"]
    return "\n".join([*lines, *(f"      {key}: {value}" for key, value in options.items())])


def page(root: Path, package: str) -> str:
    """The Markdown of a package's page: directives that mkdocstrings replaces by the docstrings.

    Raises:
        ValueError: there is no such package.
    """
    found = modules(root, package)
    if not found:
        raise ValueError(f"packages/{package}/src holds no module")
    face, *rest = found
    subpackages = {module.name: module for module in rest if module.path.name == "__init__.py"}
    outside = [module for module in rest if module.name not in subpackages and module.name.count(".") == 1]
    blocks = [_block(face.name, 1, members="false", show_root_full_path="true")]
    names = public_names(face)
    if names:
        by_name = {module.name: module for module in rest}
        # A constant has no entry of its own: it is in its module's source, which may be another package's.
        rows = [
            f"| [`{name}`][{origin}.{name}] | [`{origin}`][{origin}] |"
            if origin in by_name and name in by_name[origin].names
            else f"| `{name}` | [`{origin}`][{origin}] |"
            for name, origin in names.items()
        ]
        blocks += [f"## Names of {face.name} {{ #names }}", "\n".join(["| name | defined in |", "|---|---|", *rows])]
    if any(module.names for module in outside):
        blocks.append(f"## Modules of {face.name} {{ #modules }}")
        blocks += [_block(module.name, 3) for module in outside if module.names]
    for subpackage in sorted(subpackages):
        inside = [
            module
            for module in rest
            if module.name.rpartition(".")[0] == subpackage and module.name not in subpackages and module.names
        ]
        own = subpackages[subpackage].names
        blocks.append(_block(subpackage, 2, **({} if own else {"members": "false"})))
        blocks += [_block(module.name, 3) for module in inside]
    return "\n\n".join(blocks)
