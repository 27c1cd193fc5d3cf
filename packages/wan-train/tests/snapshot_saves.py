"""What a rank does at changes on the disk: copy the checkpoint folder before each, or end without warning at one.

Called in a rank before it trains (``warm_ranks.Call``). The processes that the rank forks to write tensors watch too.
"""

import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def copy_at_every_change(snapshots: str, folder: str, after: int) -> None:
    """Copy FOLDER before every change in it, once step AFTER is complete there.

    Each copy is what a kill at that moment would leave; they are named in the order of time.
    """

    def copy() -> None:
        while True:
            target = Path(snapshots, str(time.time_ns()))
            try:
                shutil.copytree(folder, target)
                return
            except shutil.Error:  # another writer renamed a file meanwhile
                shutil.rmtree(target)

    _before_changes(Path(folder), after, copy)


def end_at_change(number: int, folder: str, after: int) -> None:
    """SIGKILL for the rank and all that it has forked, before the change of that number once step AFTER is complete."""
    left = number

    def count() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.killpg(0, signal.SIGKILL)

    _before_changes(Path(folder), after, count)


def _before_changes(folder: Path, after: int, action: Callable[[], None]) -> None:
    begins = folder / f"iter_{after:07d}" / "complete.json"
    root, busy, begun = str(folder), False, False

    def changes(event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "open":
            path, mode, flags = arguments
            writes = (
                bool(flags & _WRITES) if isinstance(flags, int) and not mode else any(c in str(mode) for c in "wax+")
            )
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.copyfile", "shutil.rmtree"):
            path, writes = arguments[1] if event in ("os.rename", "shutil.copyfile") else arguments[0], True
        else:
            return False
        if not writes or not isinstance(path, str | os.PathLike):
            return False
        name = os.fspath(path)
        return isinstance(name, str) and name.startswith(root) and not name.endswith((".jsonl", ".log"))

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal busy, begun
        if busy or not changes(event, arguments):
            return
        busy = True
        try:
            begun = begun or begins.exists()
            if begun:
                action()
        finally:
            busy = False

    sys.addaudithook(hook)
