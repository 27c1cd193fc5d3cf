"""Installs a folder of wheels into a folder of its own; nothing of the machine is changed. Imports no torch."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from gpu.rows import Found, Row, one_line

_PIP = [
    *(sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir"),
    *("--disable-pip-version-check", "--root-user-action=ignore", "--upgrade", "--target"),
]


def _pip(site: Path, wheels: list[Path], seconds: float, ended: Callable[[], bool]) -> str | None:
    """None, or why it failed."""
    end = time.monotonic() + seconds
    command = [*_PIP, str(site), *map(str, wheels)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while True:
            try:
                output, _ = process.communicate(timeout=0.25)
                return None if process.returncode == 0 else one_line(output)
            except subprocess.TimeoutExpired:
                if ended() or time.monotonic() > end:
                    process.kill()
                    return "the check was ended" if ended() else f"pip took more than {seconds:.0f} s"


def install_wheels(folder: Path, site: Path, seconds: float, ended: Callable[[], bool] = lambda: False) -> list[Row]:
    """Install all wheels of a folder; one that cannot be installed does not keep out the others.

    Args:
        folder: of the wheels.
        site: the folder to install into.
        seconds: for everything.
        ended: whether the whole check is to end at once.

    Returns:
        One row, or one for each wheel that failed.
    """
    wheels = sorted(folder.glob("*.whl"))
    start = time.monotonic()
    size = sum(wheel.stat().st_size for wheel in wheels) / 2**20
    rows = []
    if _pip(site, wheels, seconds, ended) is not None:
        for wheel in wheels:
            left = 0.0 if ended() else seconds - (time.monotonic() - start)
            if why := _pip(site, [wheel], left, ended) if left > 0 else "the time was used up":
                rows.append(Row(wheel.name, "failed", why))
    found = Found(
        f"{len(wheels) - len(rows)} of {len(wheels)} wheels are installed for this run", {"MiB": round(size, 1)}
    )
    took = round(time.monotonic() - start, 1)
    return [Row("wheels", "passed", found.why, found.numbers, took), *rows]
