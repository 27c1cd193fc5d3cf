"""The definition of a mutation."""

import dataclasses
from collections.abc import Callable

PACKAGES = ("wan-model", "wan-data", "wan-train", "wan-infer")


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A one-line mistake, and the tests that must fail because of it.

    Attributes:
        name: unique in the list; selects the mutation on the command line.
        package: the distribution, such as ``wan-model``.
        file: the module, relative to the package's source, such as ``dit/rope.py``.
        old: part of a line that occurs in the file exactly once.
        new: its replacement.
        harm: the consequence for a user.
        tests: files or single tests, relative to the package's ``tests``, in the order in which they are run.
    """

    name: str
    package: str
    file: str
    old: str
    new: str
    harm: str
    tests: tuple[str, ...]

    def __post_init__(self) -> None:
        assert self.package in PACKAGES, f"{self.name}: there is no package {self.package}"
        assert "\n" not in self.old + self.new, f"{self.name}: a mutation changes one line"
        assert self.old != self.new, f"{self.name}: it changes nothing"
        assert self.tests, f"{self.name}: no test is named"
        # pytest would run the whole file in its own order.
        files = [test for test in self.tests if "::" not in test]
        assert not any(test.startswith(f"{file}::") for test in self.tests for file in files), (
            f"{self.name}: name a file or single tests of it"
        )

    @property
    def path(self) -> str:
        """The changed file, relative to the root of the repository."""
        return f"packages/{self.package}/src/{self.package.replace('-', '_')}/{self.file}"

    @property
    def test_paths(self) -> tuple[str, ...]:
        """The tests, relative to the root of the repository."""
        return tuple(f"packages/{self.package}/tests/{test}" for test in self.tests)


def mutation_of(package: str) -> Callable[..., Mutation]:
    """``Mutation`` of one package: without its name, and each test is an argument."""

    def made(name: str, file: str, old: str, new: str, harm: str, *tests: str) -> Mutation:
        return Mutation(name, package, file, old, new, harm, tests)

    return made
