"""Which files a process flushes to the disk and renames, in order."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def record_flushes(events: str) -> None:
    """Append a line to a file for every flush and rename of this process and its forks, for the rest of their lives.

    A line is a list: ``sync``, path, SHA-256 of a file's content at that moment, empty for a folder; or ``rename``,
    old path, new path.
    """
    fsync, replace = os.fsync, os.replace

    def write(*event: str) -> None:
        with open(events, "a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    def recorded_fsync(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        write("sync", str(path), hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "")

    def recorded_replace(source: Any, target: Any, **options: Any) -> None:
        replace(source, target, **options)
        write("rename", os.fspath(source), os.fspath(target))

    os.fsync, os.replace = recorded_fsync, recorded_replace  # type: ignore[assignment]


def read_flushes(events: str | Path) -> list[tuple[str, str, str]]:
    """The recorded events."""
    return [tuple(json.loads(line)) for line in Path(events).read_text().splitlines()]
