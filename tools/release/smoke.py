"""``smoke.py NAME VERSION SCRIPT...`` in a new environment: check that the installed package is the released one.

Imports nothing of this repository but the package.
"""

import importlib
import subprocess
import sys
import sysconfig
from importlib.metadata import metadata, version
from pathlib import Path


def main(name: str, expected: str, scripts: list[str]) -> None:
    """Check import, version, metadata and command lines; exit with a sentence if a check fails."""
    module = importlib.import_module(name.replace("-", "_"))
    site_packages = Path(sysconfig.get_path("purelib")).resolve()
    if module.__file__ is None or site_packages not in Path(module.__file__).resolve().parents:
        raise SystemExit(f"{name} comes from {module.__file__}, not from the wheel installed in {site_packages}.")
    for where, found in (("__version__", module.__version__), ("the metadata", version(name))):
        if found != expected:
            raise SystemExit(f"{name} says {found} in {where}; expected {expected}.")
    described = metadata(name)
    for field in ("Summary", "Requires-Python", "License-Expression", "License-File", "Description-Content-Type"):
        if not described[field]:
            raise SystemExit(f"The metadata of {name} lack {field}.")
    for script in scripts:
        program = Path(sysconfig.get_path("scripts"), script)
        for option, wanted in (("--help", "Usage:"), ("--version", expected)):
            done = subprocess.run([program, option], capture_output=True, text=True, check=False)
            if done.returncode or wanted not in done.stdout:
                raise SystemExit(f"{script} {option} ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    said = f", and so do {', '.join(scripts)} --help and --version" if scripts else ""
    print(f"{name} {expected} imports from its wheel{said}.")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
