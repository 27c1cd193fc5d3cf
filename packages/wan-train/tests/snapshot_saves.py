"""Run training as ``wan_train.launch.worker`` does, and copy the checkpoint folder before every change on the disk.

``python snapshot_saves.py SNAPSHOTS FOLDER AFTER OPTIONS``: FOLDER is the checkpoint folder; copies begin once step
AFTER is complete in it. Each copy is what a kill at that moment would leave; they are named in the order of time. The
processes that this one forks to write tensors watch as well.
"""

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def watch(snapshots: Path, folder: Path, after: int) -> None:
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
            while begun:
                copy = snapshots / str(time.time_ns())
                try:
                    shutil.copytree(folder, copy)
                    break
                except shutil.Error:  # another writer renamed a file meanwhile
                    shutil.rmtree(copy)
        finally:
            busy = False

    sys.addaudithook(hook)


if __name__ == "__main__":
    snapshots, folder, after, options = sys.argv[1:]
    watch(Path(snapshots), Path(folder), int(after))
    sys.argv = [sys.argv[0], options]
    from wan_train.launch import worker

    sys.exit(worker.main())
