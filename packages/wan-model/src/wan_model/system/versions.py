"""Checks that the installed dependencies have versions that a package works with. Imports nothing heavy.

pip checks versions when it installs, but not for what ``--no-deps`` or a container brings. The bounds stand once, in
the ``pyproject.toml`` of each package, and are read here from its metadata.
"""

import importlib.metadata
from collections.abc import Iterable, Iterator

from packaging.requirements import Requirement

_OURS = ("wan-model", "wan-data", "wan-train", "wan-infer")


class VersionError(ValueError):
    """A dependency is missing or has a version outside the bounds of the package that needs it."""


def check_dependencies(distribution: str, extras: Iterable[str] = ()) -> None:
    """Check the direct dependencies of one of our packages, and of those of our packages that it depends on.

    A package that runs from its sources, without being installed, has no metadata and is not checked.

    Args:
        distribution: its name.
        extras: names of its extras whose dependencies are needed too.

    Raises:
        VersionError: the message names each such dependency, what was found and what is needed.
    """
    problems = list(dict.fromkeys(_problems(distribution, frozenset(extras), set())))
    if problems:
        raise VersionError(f"{'; '.join(problems)}: install what is needed with pip")


def _problems(distribution: str, extras: frozenset[str], seen: set[tuple[str, frozenset[str]]]) -> Iterator[str]:
    if (distribution, extras) in seen:
        return
    seen.add((distribution, extras))
    try:
        lines = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for requirement in map(Requirement, lines):
        marker = requirement.marker
        if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            # Found by import and not by pip: a folder on PYTHONPATH.
            if requirement.name not in _OURS:
                yield f"{distribution} needs {_wanted(requirement)}, which is not installed"
        else:
            # An installed pre-release, such as those of NVIDIA's containers, counts by its place in the order.
            if not requirement.specifier.contains(found, prereleases=True):
                yield f"{distribution} needs {_wanted(requirement)}, and {found} is installed"
        if requirement.name in _OURS:
            yield from _problems(requirement.name, frozenset(requirement.extras), seen)


def _wanted(requirement: Requirement) -> str:
    bounds = sorted(requirement.specifier, key=lambda bound: not bound.operator.startswith((">", "=")))
    return f"{requirement.name}{','.join(map(str, bounds))}"
