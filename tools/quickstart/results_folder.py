"""The folder of results: only one that the quickstart has made is cleared, and only one run at a time writes to it."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.failure import ToolFailure, require
from wan_model.system.files import locked

MARKER = ".quickstart"
_EXPLANATION = (
    b"The quickstart has made this folder: a further run removes the results in it.\n"
    b"This file is locked while one runs.\n"
)


def _shown(path: Path) -> str:
    return os.path.relpath(path)


@contextlib.contextmanager
def claimed(folder: Path, results: Sequence[str]) -> Iterator[int]:
    """Make the folder, or clear one that an earlier run has made, and lock it for this run.

    The marker is written before anything else, so that the next run knows the folder also if this one is killed.

    Args:
        folder: created if absent, with the folders above it.
        results: names of the files and folders in it that a run makes; others are kept.

    Returns:
        The descriptor that holds the lock.

    Raises:
        ToolFailure: it is a file, is not empty and no run has made it, holds a link in the place of a result, or
            another run writes to it; then nothing is changed.
    """
    marker = folder / MARKER
    elsewhere = "choose another folder with --folder"
    if os.path.lexists(folder):
        require(folder.is_dir(), f"{_shown(folder)} is a file or a broken link; expected a folder; {elsewhere}")
        require(
            (marker.is_file() and not marker.is_symlink()) or not any(folder.iterdir()),
            f"{_shown(folder)} holds files and no {MARKER}, so the quickstart has not made it; expected a new or empty "
            f"folder, or that of an earlier run; {elsewhere}",
        )
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(locked(marker))
        except BlockingIOError:
            raise ToolFailure(
                f"another run, or a command that it left, is writing to {_shown(folder)}; expected one at a time; "
                f"wait for its end, or {elsewhere}"
            ) from None
        links = [_shown(folder / name) for name in results if (folder / name).is_symlink()]
        require(
            not links,
            f"{', '.join(links)}: a symbolic link; expected a file or a folder of an earlier run; remove the link, or "
            f"{elsewhere}",
        )
        os.pwrite(lock, _EXPLANATION, 0)
        for name in results:
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        yield lock
