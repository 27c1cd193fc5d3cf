"""Check that forbidden distributions are not installed with a package: ``check_isolation.py MODULE FORBIDDEN...``.

It runs in the new environment of an isolation session of the noxfile. It fails with one sentence if a forbidden
distribution is installed there (a trailing ``*`` matches any ending), or if MODULE is imported from a source tree
instead of that environment's site-packages, in which case the tests would not test the wheel.
"""

import importlib.util
import re
import sys
import sysconfig
from fnmatch import fnmatchcase
from importlib.metadata import distributions
from pathlib import Path


def normalised(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def main(module: str, forbidden: list[str]) -> None:
    """Check ``module`` and the installed distributions; exit with a sentence if something is wrong."""
    installed = sorted({normalised(distribution.metadata["Name"]) for distribution in distributions()})
    found = [name for name in installed if any(fnmatchcase(name, pattern) for pattern in forbidden)]
    if found:
        raise SystemExit(f"{module} must do without {', '.join(found)}, but its dependencies installed them")

    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{module} is not installed in this environment")
    site_packages = Path(sysconfig.get_path("purelib")).resolve()
    if site_packages not in Path(spec.origin).resolve().parents:
        raise SystemExit(f"{module} comes from {spec.origin}, not from the wheel installed in {site_packages}")
    print(f"{module}: {len(installed)} distributions, none of {', '.join(forbidden)}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
