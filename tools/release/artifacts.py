"""Wheel and source distribution, built from a copy and tested in an empty environment."""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from release.package import Package
from release.plan import Plan, git


class CommandError(Exception):
    """A command of the build failed; its output has been printed."""


def _run(*command: str | Path, **environment: str) -> None:
    # What is tested is what was installed, so nothing of this checkout may be on the path.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), env={**inherited, **environment}, check=False)
    if done.returncode:
        raise CommandError(f"{' '.join(map(str, command))} ended with status {done.returncode}.")


def copy_package(package: Package, edits: Mapping[Path, str], target: Path) -> Path:
    """A package's tracked files with some of them changed, and the licence, which every distribution carries."""
    for name in git(package.root, "ls-files", "-z", f"packages/{package.name}").split("\0"):
        if name:
            file = target / Path(name).relative_to("packages")
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(package.root / name, file)
    folder = target / package.name
    for path, text in edits.items():
        (folder / path.relative_to(package.folder)).write_text(text, encoding="utf-8")
    shutil.copyfile(package.root / "LICENSE", folder / "LICENSE")
    return folder


@dataclass(frozen=True)
class BuildEnvironment:
    """Builds and tests distributions.

    Args:
        scratch: an empty folder for temporary files.
        offline: download nothing: build with the installed hatchling, and test the wheel with the installed
            dependencies.
    """

    scratch: Path
    offline: bool = False

    def build(self, package: Package, edits: Mapping[Path, str], output: Path, *, wheel_only: bool = False) -> Path:
        """Build a package into ``output`` and return its wheel.

        Raises:
            CommandError: it cannot be built.
        """
        folder = copy_package(package, edits, self.scratch / "sources")
        options = [*(["--wheel"] if wheel_only else []), *(["--no-isolation"] if self.offline else [])]
        _run(sys.executable, "-m", "build", *options, "--outdir", output, folder)
        (wheel,) = output.glob(f"{package.module}-*.whl")
        return wheel

    def install(self, wheels: list[Path], constraints: Path) -> Path:
        """Install wheels into an empty environment and return its Python.

        Raises:
            CommandError: they cannot be installed.
        """
        environment = self.scratch / "environment"
        _run(sys.executable, "-m", "venv", "--without-pip", environment)
        python = environment / "bin" / "python"
        pip = [sys.executable, "-m", "pip", "--python", str(python), "--quiet", "install"]
        if self.offline:
            _run(*pip, "--no-index", "--no-deps", *wheels)
            (site_packages,) = environment.glob("lib/python*/site-packages")
            # A path in such a file is searched last, and what is installed there editable stays unseen.
            (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        else:
            _run(*pip, "--constraint", constraints, *wheels)
        return python


def make(plan: Plan, environment: BuildEnvironment) -> list[Path]:
    """Build, check and test the release; returns its two files, which are in the scratch folder.

    Raises:
        CommandError: a step failed.
    """
    package = plan.package
    made = environment.scratch / "release"
    wheel = environment.build(package, plan.edits, made)
    files = sorted(made.iterdir())
    if not environment.offline:
        _run(sys.executable, "-m", "twine", "check", "--strict", *files)
    siblings = [environment.build(one, {}, environment.scratch / "siblings", wheel_only=True) for one in plan.siblings]
    python = environment.install([*siblings, wheel], package.root / "constraints.txt")
    scripts = list(package.project.get("scripts", {}))
    _run(python, "-P", Path(__file__).with_name("smoke.py"), package.name, str(plan.version), *scripts)
    return files


def deliver(plan: Plan, files: Sequence[Path]) -> Path:
    """Copy the release's files to its folder in ``dist``, and write the edits; returns that folder."""
    output = plan.package.root / "dist" / f"{plan.package.name}-{plan.version}"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    for file in files:
        shutil.copy2(file, output)
    for path, text in plan.edits.items():
        path.write_text(text, encoding="utf-8")
    return output
