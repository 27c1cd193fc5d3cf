"""The changes of a release, and the checks that can refuse it. Nothing is written here."""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from packaging.version import InvalidVersion, Version

from release import changelog
from release.package import Package, needed_by, packages


@dataclass(frozen=True)
class Plan:
    """A release that has passed the checks.

    Attributes:
        commit: the commit that is released.
        package: the package to release.
        version: the new version.
        changes: its section of the changelog.
        edits: the new text of each file that changes.
        siblings: packages of this repository that it depends on, dependencies first.
        unreleased: those of them whose version has not been released.
    """

    commit: str
    package: Package
    version: Version
    changes: str
    edits: dict[Path, str]
    siblings: list[Package]
    unreleased: list[Package]

    @property
    def tag(self) -> str:
        """The name of the release's git tag."""
        return f"{self.package.name}-v{self.version}"


def git(root: Path, *arguments: str) -> str:
    """The output of a git command."""
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout


def make_plan(root: Path, name: str, wanted: str | None, day: date) -> Plan:
    """Choose the version and check everything that can be checked without building.

    Args:
        root: of the repository.
        name: of the package.
        wanted: the version; without one it is ``__version__`` if that has not been released, else the next patch.
        day: the date of the release.

    Raises:
        ValueError: the release is refused; the message is the reason.
    """
    every = packages(root)
    if name not in every:
        raise ValueError(f"There is no package {name!r}; expected one of {', '.join(every)}.")
    changed = git(root, "status", "--porcelain").splitlines()
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise ValueError(f"The working tree has changes ({changed[0][3:]}{more}); commit them, or remove them.")

    package = every[name]
    history = package.changelog.read_text(encoding="utf-8")
    try:
        released = changelog.released(history)
        changes = changelog.unreleased(history)
    except ValueError as error:
        raise ValueError(f"The changelog of {name} cannot be used: {error}.") from None
    version = _choose(package.version, released, wanted)
    plan = Plan(
        git(root, "rev-parse", "HEAD").strip(),
        package,
        version,
        changes,
        {
            package.init: package.init_with(version),
            package.changelog: changelog.with_release(history, version, day),
        },
        siblings := needed_by(package, every),
        [one for one in siblings if one.version not in changelog.released(one.changelog.read_text(encoding="utf-8"))],
    )
    if git(root, "tag", "--list", plan.tag).strip():
        raise ValueError(f"The tag {plan.tag} exists; choose another version with --version.")
    _check_siblings(package, version, list(every.values()))
    return plan


def _choose(current: Version, released: Sequence[Version], wanted: str | None) -> Version:
    newest = max(released, default=None)
    if wanted is None:
        if current not in released:
            version = current
        else:
            version = Version(f"{current.major}.{current.minor}.{current.micro + 1}")
    else:
        try:
            version = Version(wanted)
        except InvalidVersion:
            raise ValueError(f"{wanted!r} is no version; expected one such as 0.2.0.") from None
        if version.local is not None:
            raise ValueError(f"{wanted} has a local part, which an index refuses; leave out +{version.local}.")
    if newest is not None and version <= newest:
        raise ValueError(f"{version} is not newer than {newest}, which has been released; choose a higher version.")
    if version < current:
        raise ValueError(f"{version} is lower than __version__, {current}; choose that or a higher one.")
    return version


def _check_siblings(package: Package, version: Version, every: Sequence[Package]) -> None:
    names = {one.name: one for one in every}
    for requirement in package.requirements_on(set(names)):
        there = names[requirement.name].version
        if not requirement.specifier.contains(there, prereleases=True):
            raise ValueError(
                f"{package.name} requires {requirement}, but {requirement.name} is {there}; release such a version "
                f"first, or change packages/{package.name}/pyproject.toml."
            )
    for other in every:
        for requirement in other.requirements_on({package.name}):
            if not requirement.specifier.contains(version, prereleases=True):
                raise ValueError(
                    f"{other.name} requires {requirement}, which {version} is not; "
                    f"change packages/{other.name}/pyproject.toml first."
                )
