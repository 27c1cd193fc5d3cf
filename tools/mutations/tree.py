"""A copy of the packages that mutations are applied to, so that the checkout is never changed."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from mutations.mutation import PACKAGES, Mutation

_NOT_COPIED = shutil.ignore_patterns("__pycache__", ".pytest_cache", ".hypothesis", "*.egg-info", "dist", "build")


class CopyNotUsedError(RuntimeError):
    """Tests would import other code than the copy's."""


class Tree:
    """A copy of the sources and tests of all packages.

    Args:
        root: of the repository.
        folder: an empty or new folder.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(root / "packages", folder / "packages", ignore=_NOT_COPIED)
        shutil.copyfile(root / "pyproject.toml", folder / "pyproject.toml")  # pytest's settings

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment variables, with the copy's sources first on the import path."""
        sources = [str(self.folder / "packages" / package / "src") for package in PACKAGES]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(sources)}

    def check_imports(self) -> None:
        """Check that processes with this environment import the copy.

        Raises:
            CopyNotUsedError: naming a module that comes from elsewhere.
        """
        for package in PACKAGES:
            code = f"import {package.replace('-', '_')} as module; print(module.__file__)"
            done = subprocess.run(
                [sys.executable, "-P", "-c", code],
                env=self.environment, cwd=self.folder, capture_output=True, text=True, check=True,
            )  # fmt: skip
            if not Path(done.stdout.strip()).is_relative_to(self.folder):
                raise CopyNotUsedError(f"{package} is imported from {done.stdout.strip()}, not from {self.folder}")

    @contextlib.contextmanager
    def mutated(self, mutation: Mutation) -> Iterator[None]:
        """Apply a mutation to the copy while the block runs.

        Raises:
            ValueError: see ``mutate``.
        """
        path = self.folder / mutation.path
        with self.replaced(path, mutate(self.folder, mutation)):
            yield

    @contextlib.contextmanager
    def replaced(self, path: Path, text: str) -> Iterator[None]:
        """Replace the content of a file of the copy while the block runs."""
        before = path.read_text(encoding="utf-8")
        try:
            _write(path, text)
            yield
        finally:
            _write(path, before)


def mutate(root: Path, mutation: Mutation) -> str:
    """The mutated text of the file.

    Raises:
        ValueError: the file is missing, or does not hold the old text exactly once.
    """
    path = root / mutation.path
    if not path.is_file():
        raise ValueError(f"{mutation.name}: {mutation.path} does not exist; name the file where the code is now")
    text = path.read_text(encoding="utf-8")
    if (count := text.count(mutation.old)) != 1:
        raise ValueError(
            f"{mutation.name}: {mutation.path} holds {mutation.old!r} {count} times, expected once; give the text "
            "as it is now"
        )
    return text.replace(mutation.old, mutation.new)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    # Python recognises stale bytecode by modification time in seconds and size, which may both be unchanged.
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()
