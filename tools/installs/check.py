"""Runs the commands of a route with pip's dry run, in an environment with stub wheels, and checks the result."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import canonicalize_name

from installs.routes import Route
from installs.stub_wheel import write_stub_wheel

CONTAINERS_PYTHON = "3.12"


class RouteError(Exception):
    """A route does not work; the message is the reason."""


@dataclass(frozen=True)
class Machine:
    """An environment in a temporary folder.

    Args:
        folder: an empty folder.
        root: the root of the repository, where commands run.
        python: the interpreter that the environment is made from.
    """

    folder: Path
    root: Path
    python: str

    @property
    def _bin(self) -> Path:
        return self.folder / "environment" / "bin"

    def make(self, present: Mapping[str, str], *, with_pip: bool) -> None:
        """Make the environment and install stub wheels; a pip of its own takes seconds."""
        self._run([self.python, "-m", "venv", *([] if with_pip else ["--without-pip"]), str(self._bin.parent)])
        wheels = [write_stub_wheel(self.folder, name, version) for name, version in present.items()]
        self._run(["pip", "install", "--no-deps", "--no-index", *map(str, wheels)])

    def _run(self, command: list[str], **variables: str) -> None:
        shown = shlex.join(command)
        if command[0] == "pip":
            command = [sys.executable, "-m", "pip", "--python", str(self._bin / "python"), *command[1:]]
        path = os.pathsep.join([str(self._bin), os.environ["PATH"]])
        environment = {**os.environ, "PATH": path, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **variables}
        done = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
            raise RouteError(f"{shown} ended with status {done.returncode}:\n{last}")

    def dry_run(self, command: str, **variables: str) -> dict[str, str]:
        """The versions that a command would install, by name. The command passes its last arguments to pip.

        Raises:
            RouteError: it fails.
        """
        report = self.folder / "report.json"
        # Not by pip's environment variables, which would reach the pip that installs what a build needs.
        self._run([*shlex.split(command), "--dry-run", "--report", str(report)], **variables)
        entries = json.loads(report.read_text(encoding="utf-8"))["install"]
        return {canonicalize_name(entry["metadata"]["name"]): entry["metadata"]["version"] for entry in entries}


def interpreter(version: str = CONTAINERS_PYTHON) -> str:
    """An interpreter of that version if there is one that runs, else this one."""
    name = shutil.which(f"python{version}")
    works = name and not subprocess.run([name, "-c", ""], capture_output=True, check=False).returncode
    return name if name and works else sys.executable


def check(route: Route, root: Path, python: str, **variables: str) -> dict[str, str]:
    """What the commands of a route would install.

    Args:
        route: the route.
        root: the root of the repository.
        python: the interpreter of the machine.
        variables: further environment variables of pip.

    Raises:
        RouteError: pip cannot resolve a command, or something would be replaced, is missing or must not come.
    """
    with tempfile.TemporaryDirectory(prefix="installs-") as scratch:
        machine = Machine(Path(scratch), root, python)
        machine.make(route.present, with_pip=any(not command.startswith("pip ") for command in route.commands))
        if route.built:
            links = Path(scratch) / "built"
            links.mkdir()
            for name, requires in route.built.items():
                for version in ("2.10.0", "2.11.0", "2.12.0"):
                    write_stub_wheel(links, name, version, requires)
            # Of the same version pip prefers a wheel to sources.
            variables["PIP_FIND_LINKS"] = " ".join([str(links), *variables.get("PIP_FIND_LINKS", "").split()])
        if route.constraints:
            file = Path(scratch) / "constraints.txt"
            file.write_text("\n".join(route.constraints) + "\n", encoding="utf-8")
            variables["PIP_CONSTRAINT"] = " ".join([str(file), *os.environ.get("PIP_CONSTRAINT", "").split()])
        found: dict[str, str] = {}
        for command in route.commands:
            found |= machine.dry_run(command, **variables)
    _check_found(route, found)
    return found


def _check_found(route: Route, found: Mapping[str, str]) -> None:
    replaced = [f"{n} {v} would be replaced by {found[n]}" for n, v in route.present.items() if n in found]
    missing = [f"{name} would not be installed" for name in route.installs if name not in found]
    unwanted = [f"{name} {found[name]} would be installed" for name in route.avoids if name in found]
    if problems := [*replaced, *missing, *unwanted]:
        raise RouteError("; ".join(problems))
