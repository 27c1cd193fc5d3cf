"""``python -m release PACKAGE [--version X.Y.Z]``: prepare the release of one package, and publish nothing.

The version is written to the package's ``__init__``, and the changelog's unreleased section gets the version and the
date. Wheel and source distribution are built from a copy and tested in an empty environment before any file changes.
"""

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from release.artifacts import BuildEnvironment, CommandError, deliver, make
from release.plan import Plan, make_plan

ROOT = Path(__file__).parents[2]


def _described(plan: Plan) -> str:
    changed = [path for path, text in plan.edits.items() if text != path.read_text(encoding="utf-8")]
    files = ", ".join(str(path.relative_to(plan.package.root)) for path in changed)
    lines = [f"{plan.package.name} {plan.version} changes {files}. Its section of the changelog:", "", plan.changes, ""]
    if plan.unreleased:
        lines += [_first(plan), ""]
    return "\n".join(lines)


def _first(plan: Plan) -> str:
    names = " and ".join(f"{one.name} {one.version}" for one in plan.unreleased)
    return f"Release {names} first: this package needs it, and no changelog says that it is released."


def _next_steps(plan: Plan, output: Path) -> str:
    package, folder = plan.package, output.relative_to(plan.package.root)
    lines = [f"{package.name} {plan.version} is in {folder}, and nothing has been published. What to do next:"]
    if plan.unreleased:
        lines.append(f"- {_first(plan)}")
    lines += [
        "- Read the change: git diff",
        f'- Commit it: git commit -m "Release {package.name} {plan.version}" -- packages/{package.name}',
        f'- Tag the commit: git tag -a {plan.tag} -m "{package.name} {plan.version}"',
        f"- Push both: git push origin HEAD {plan.tag}",
        f"- Upload: {_twine(plan.package.root)} upload {folder}/*",
    ]
    return "\n".join(lines)


def _twine(root: Path) -> str:
    # twine is installed in the environment that runs this, which is .nox/release in the session of that name.
    environment = Path(sys.prefix)
    if environment.is_relative_to(root):
        environment = environment.relative_to(root)
    return f"{environment / 'bin' / 'python'} -m twine"


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> None:
    """Prepare a release, or exit with the reason why it is refused."""
    parser = argparse.ArgumentParser(prog="release", description=__doc__)
    parser.add_argument("package", help="wan-model, wan-data, wan-train or wan-infer")
    parser.add_argument(
        "--version", help="version of the release; by default __version__, or the next patch if that is released"
    )
    parser.add_argument("--dry-run", action="store_true", help="check and print, but build and change nothing")
    parser.add_argument("--offline", action="store_true", help="download nothing: use installed packages; no twine")
    options = parser.parse_args(arguments)
    try:
        day = datetime.now(UTC).date()
        plan = make_plan(root, options.package, options.version, day)
        print(_described(plan), flush=True)
        if options.dry_run:
            return
        with tempfile.TemporaryDirectory(prefix="release-") as scratch:
            files = make(plan, BuildEnvironment(Path(scratch), options.offline))
            # Edits and commits made meanwhile are in neither file, and would be overwritten.
            if make_plan(root, options.package, options.version, day) != plan:
                raise ValueError("A commit was made during the build; run this command again.")
            output = deliver(plan, files)
    except (ValueError, CommandError) as error:
        raise SystemExit(str(error)) from None
    print(f"\n{_next_steps(plan, output)}")


if __name__ == "__main__":
    # So that the temporary folder is removed.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    main()
