"""Metadata of one of the repository's packages, read from its files."""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

_VERSION = re.compile(r'^__version__ = "(.*)"$', re.M)


@dataclass(frozen=True)
class Package:
    """A distribution below ``packages/``.

    Args:
        root: of the repository.
        name: of the distribution.
    """

    root: Path
    name: str

    @property
    def folder(self) -> Path:
        """Its folder."""
        return self.root / "packages" / self.name

    @property
    def module(self) -> str:
        """Its import name."""
        return self.name.replace("-", "_")

    @property
    def init(self) -> Path:
        """The file that defines its version."""
        return self.folder / "src" / self.module / "__init__.py"

    @property
    def changelog(self) -> Path:
        """Its changelog."""
        return self.folder / "CHANGELOG.md"

    @property
    def project(self) -> dict[str, Any]:
        """The ``project`` table of its pyproject."""
        return tomllib.loads((self.folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    @property
    def version(self) -> Version:
        """``__version__``, the only definition of the version.

        Raises:
            ValueError: it is not defined, or the pyproject defines it too.
        """
        found = _VERSION.findall(self.init.read_text(encoding="utf-8"))
        if len(found) != 1:
            raise ValueError(f'{self.init} has {len(found)} lines such as __version__ = "0.1.0"; expected one.')
        if "version" in self.project:
            raise ValueError(f"{self.folder}/pyproject.toml gives a version too; list it under dynamic instead.")
        return Version(found[0])

    def init_with(self, version: Version) -> str:
        """The text of ``init`` with another version."""
        return _VERSION.sub(f'__version__ = "{version}"', self.init.read_text(encoding="utf-8"))

    def requirements(self) -> list[Requirement]:
        """Its requirements, including those of all extras."""
        extras = self.project.get("optional-dependencies", {}).values()
        return [Requirement(text) for group in (self.project["dependencies"], *extras) for text in group]

    def requirements_on(self, names: set[str]) -> list[Requirement]:
        """Its requirements on the given distributions, except itself."""
        others = names - {self.name}
        return [one for one in self.requirements() if canonicalize_name(one.name) in others]


def packages(root: Path) -> dict[str, Package]:
    """All packages of the repository, by name."""
    names = sorted(path.parent.name for path in root.glob("packages/*/pyproject.toml"))
    return {name: Package(root, name) for name in names}


def needed_by(package: Package, every: dict[str, Package]) -> list[Package]:
    """The packages of the repository that this one depends on, each after its own dependencies."""
    ordered: list[Package] = []

    def add(one: Package) -> None:
        for text in one.project["dependencies"]:
            name = canonicalize_name(Requirement(text).name)
            if name in every and name != one.name:
                add(every[name])
        if one not in ordered and one is not package:
            ordered.append(one)

    add(package)
    return ordered
