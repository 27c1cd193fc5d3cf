"""Running the tests of a mutation on a copy, and the resulting verdict."""

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from mutations.mutation import Mutation
from mutations.tree import Tree

Verdict = Literal["caught", "missed", "timed out", "not run"]
_PASSED, _FAILED = 0, 1  # pytest's exit status; any other means that it could not run the tests
_FIRST_FAILURE = re.compile(r"^(?:FAILED|ERROR) (\S+::[^\n]*?)(?: - .*)?$", re.MULTILINE)
_NOT_FOUND = re.compile(r"^ERROR: not found: (.*)$", re.MULTILINE)
_CONTROL = "the control mutation of {package}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of a mutation.

    Attributes:
        mutation: the mutation.
        verdict: ``caught`` if a test failed, ``missed`` if all passed.
        seconds: duration of the tests.
        test: the first test that failed, or the reason why the tests could not run.
        output: pytest's output.
    """

    mutation: Mutation
    verdict: Verdict
    seconds: float
    test: str
    output: str


@dataclasses.dataclass(frozen=True)
class _Run:
    code: int | None  # None where the limit was reached
    seconds: float
    output: str


def run_tests(tree: Tree, tests: Sequence[str], limit: float, *options: str) -> _Run:
    """Run tests of the copy, with its sources first on the path."""
    command = [
        sys.executable, "-P", "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider",
        f"--basetemp={tree.folder / 'temporary'}", *options, *tests,
    ]  # fmt: skip
    log, begun = tree.folder / "pytest.log", time.monotonic()
    with log.open("wb") as file:
        # Not a pipe: a process that outlives the tests would keep it open.
        process = subprocess.Popen(
            command,
            env=tree.environment,
            cwd=tree.folder,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code: int | None = None
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return _Run(code, time.monotonic() - begun, log.read_text(encoding="utf-8", errors="replace"))


def try_mutation(tree: Tree, mutation: Mutation, limit: float) -> Outcome:
    """Apply a mutation, run its tests until one fails, and revert it."""
    try:
        with tree.mutated(mutation):
            run = run_tests(tree, mutation.test_paths, limit, "-x")
    except ValueError as error:
        return Outcome(mutation, "not run", 0.0, str(error), "")
    if run.code is None:
        return Outcome(mutation, "timed out", run.seconds, f"after {limit:.0f} s", run.output)
    if run.code == _PASSED:
        return Outcome(mutation, "missed", run.seconds, "", run.output)
    if run.code != _FAILED:
        return Outcome(mutation, "not run", run.seconds, f"pytest ended with {run.code}", run.output)
    found = _FIRST_FAILURE.search(run.output)
    test = found[1].removeprefix(f"packages/{mutation.package}/tests/") if found else "?"
    return Outcome(mutation, "caught", run.seconds, test, run.output)


def control_problem(tree: Tree, package: str, mutations: Sequence[Mutation], limit: float) -> str | None:
    """The reason why the verdicts on a package's mutations are not reliable; None if they are.

    A package that cannot be imported must fail, or the tests would be running other code, and the tests must pass on
    the sources as they are.
    """
    module = package.replace("-", "_")
    path = tree.folder / "packages" / package / "src" / module / "__init__.py"
    said = _CONTROL.format(package=package)
    with tree.replaced(path, f"raise RuntimeError({said!r})\n"):
        run = run_tests(tree, mutations[0].test_paths[:1], limit, "-x")
    if run.code == _PASSED or said not in run.output:
        return f"{package} cannot be imported and its tests do not say so: they run other code than the copy's"
    tests = list(dict.fromkeys(test for mutation in mutations for test in mutation.test_paths))
    run = run_tests(tree, tests, limit * len(mutations))
    if run.code != _PASSED:
        return f"the tests of {package} do not pass on the sources as they are:\n{_tail(run.output)}"
    return None


def uncollected_tests(root: Path, mutations: Sequence[Mutation]) -> list[str]:
    """Those of the named tests, with their parameters, that pytest does not find."""
    tests = dict.fromkeys(test for mutation in mutations for test in mutation.test_paths)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode == _PASSED:
        return []
    found = _NOT_FOUND.findall(done.stdout + done.stderr)
    return [path.removeprefix(f"{root}/") for path in found] or [_tail(done.stdout + done.stderr)]


def _tail(output: str) -> str:
    return "\n".join(output.splitlines()[-30:])
