"""Recording what a program flushes to the disk and renames, in order."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Event:
    """A call of the operating system.

    Attributes:
        kind: ``sync`` (of a file or a folder), ``rename`` or ``mkdir``.
        path: of the file or folder; for a rename, the old name.
        target: the new name of a rename.
        sha256, lines: of the file's content at that moment; None and 0 for a folder.
    """

    kind: str
    path: str
    target: str = ""
    sha256: str | None = None
    lines: int = 0


def _content(path: str) -> tuple[str | None, int]:
    if not os.path.isfile(path):
        return None, 0
    content = Path(path).read_bytes()
    return hashlib.sha256(content).hexdigest(), content.count(b"\n")


@contextlib.contextmanager
def recorded_writes() -> Iterator[list[Event]]:
    """Collect the events of the block; ``Path.replace``, ``Path.rename`` and ``shutil.move`` call those of ``os``."""
    events: list[Event] = []
    originals = {name: getattr(os, name) for name in ("fsync", "fdatasync", "replace", "rename", "mkdir")}

    def sync(descriptor: int) -> None:
        originals["fsync"](descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        events.append(Event("sync", path, "", *_content(path)))

    def renaming(name: str) -> Any:
        def rename(source: Any, target: Any, **options: Any) -> None:
            path = os.path.abspath(source)
            events.append(Event("rename", path, os.path.abspath(target), *_content(path)))
            originals[name](source, target, **options)

        return rename

    def mkdir(path: Any, *options: Any, **more: Any) -> None:
        originals["mkdir"](path, *options, **more)
        events.append(Event("mkdir", os.path.abspath(path)))

    os.fsync = os.fdatasync = sync  # type: ignore[assignment]
    os.replace, os.rename, os.mkdir = renaming("replace"), renaming("rename"), mkdir
    try:
        yield events
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def save_events(events: list[Event], path: Path) -> None:
    path.write_text(json.dumps([dataclasses.asdict(event) for event in events]))


def load_events(path: Path) -> list[Event]:
    return [Event(**value) for value in json.loads(path.read_text())]
