"""Installs a folder of wheels into a folder of its own; nothing of the machine is changed. Imports no torch."""

import subprocess
import sys
import time
from pathlib import Path

from gpu.rows import Found, Row, one_line

_PIP = [
    *(sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir"),
    *("--disable-pip-version-check", "--root-user-action=ignore", "--upgrade", "--target"),
]


def _pip(site: Path, wheels: list[Path], seconds: float) -> str | None:
    """None, or why it failed."""
    try:
        done = subprocess.run(
            [*_PIP, str(site), *map(str, wheels)], capture_output=True, text=True, check=False, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return f"pip took more than {seconds:.0f} s"
    return None if done.returncode == 0 else one_line(done.stderr or done.stdout)


def install_wheels(folder: Path, site: Path, seconds: float) -> list[Row]:
    """Install all wheels of a folder; one that cannot be installed does not keep out the others.

    Args:
        folder: of the wheels.
        site: the folder to install into.
        seconds: for everything.

    Returns:
        One row, or one for each wheel that failed.
    """
    wheels = sorted(folder.glob("*.whl"))
    start = time.monotonic()
    size = sum(wheel.stat().st_size for wheel in wheels) / 2**20
    rows = []
    if _pip(site, wheels, seconds) is not None:
        for wheel in wheels:
            left = seconds - (time.monotonic() - start)
            if why := _pip(site, [wheel], left) if left > 0 else "the time was used up":
                rows.append(Row(wheel.name, "failed", why))
    found = Found(
        f"{len(wheels) - len(rows)} of {len(wheels)} wheels are installed for this run", {"MiB": round(size, 1)}
    )
    took = round(time.monotonic() - start, 1)
    return [Row("wheels", "passed", found.why, found.numbers, took), *rows]
