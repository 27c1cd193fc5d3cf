"""The shapes in annotations, checked while tests run."""

import importlib.util
from pathlib import Path

import jaxtyping


def check_shapes(*packages: str, but: tuple[str, ...] = ()) -> None:
    """Have every function of the modules that name shapes check its arguments and its result.

    A module that imports nothing of jaxtyping is left as it is: a check takes longer than what many a small function
    does. Call it before the modules are imported.

    Args:
        packages: top-level packages.
        but: modules that stay as they are; beartype cannot check a value against a protocol, for one.
    """
    modules = {module for package in packages for module in _modules_with_shapes(package)}
    assert modules.issuperset(but), f"they name no shapes: {sorted(set(but) - modules)}"
    jaxtyping.install_import_hook(sorted(modules.difference(but)), "beartype.beartype")


def _modules_with_shapes(package: str) -> list[str]:
    spec = importlib.util.find_spec(package)
    assert spec is not None, package
    assert spec.submodule_search_locations is not None, "it is a package"
    folder = Path(spec.submodule_search_locations[0])
    return [
        ".".join((package, *path.relative_to(folder).with_suffix("").parts))
        for path in sorted(folder.rglob("*.py"))
        # The hook takes a package for all that is below it.
        if path.name != "__init__.py" and "from jaxtyping import" in path.read_text(encoding="utf-8")
    ]
