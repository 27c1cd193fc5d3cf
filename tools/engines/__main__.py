"""``python -m engines --bridge PATH [--core PATH]``: wan-train's tests with other sources of Bridge and Core.

A path is a checkout; instead of one a git reference (tag, branch or commit) can be given, which is downloaded from
GitHub. Further arguments are passed to pytest. The sources come before the installed packages in this process and in
all that it starts.
"""

import argparse
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

from packaging.version import Version

from engines.sources import (
    BRIDGE,
    CORE,
    NVRX,
    SourceError,
    core_of,
    install_resiliency,
    python_path,
)
from wan_train.engine.installed import resiliency_for

ROOT = Path(__file__).parents[2]
TESTS = "packages/wan-train/tests"
VERSIONS = """
import sys
from wan_train.engine import installed
try:
    installed.require_installed()
except ValueError as error:
    sys.exit(f"Error: {error}")
print(installed.installed_versions(), flush=True)
"""


def main() -> int:
    """Print the versions that are found, then run the tests."""
    parser = argparse.ArgumentParser(prog="nox -s engine --", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--bridge", required=True, metavar="PATH|REF", help="Megatron-Bridge: checkout or git reference"
    )
    parser.add_argument(
        "--core",
        metavar="PATH|REF",
        help="Megatron-LM, which contains Megatron-Core. Default: the one that Bridge names.",
    )
    parser.add_argument("--path", action="append", default=[], metavar="FOLDER", help="further packages; repeatable")
    parser.add_argument("--cache", type=Path, default=ROOT / ".nox" / "engines", help="for downloads")
    parser.add_argument("--workers", default="2", metavar="N", help="test processes")
    arguments, for_pytest = parser.parse_known_args()
    try:
        bridge = BRIDGE.resolve(arguments.bridge, arguments.cache)
        core = CORE.resolve(arguments.core or core_of(bridge), arguments.cache)
        further = [str(Path(folder).resolve()) for folder in arguments.path]
        least = resiliency_for(core / "megatron" / "core")
        if least and not further and Version(importlib.metadata.version(NVRX)) < Version(least):
            further.append(str(install_resiliency(least, arguments.cache)))
    except SourceError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    installed = {"WAN_INSTALLED_PATH": os.environ.get("PYTHONPATH", "")}  # for tests with both engines
    environment = {**os.environ, **installed, "PYTHONPATH": python_path(bridge, core, further)}
    print(f"Megatron-Bridge in {bridge}\nMegatron-LM in {core}", *further, sep="\n", flush=True)
    if subprocess.run([sys.executable, "-c", VERSIONS], env=environment, check=False).returncode:
        return 2
    tests = [] if any(Path(argument.partition("::")[0]).exists() for argument in for_pytest) else [TESTS]
    options = ["-n", arguments.workers, "--dist", "loadgroup"]
    command = [sys.executable, "-m", "pytest", *tests, *options, *for_pytest]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
