"""A lock file that allows one writer per dataset folder."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from wan_model.system.files import locked
from wan_model.system.safe_reading import read_text, require_file

LOCK_NAME = ".wan-data.lock"


@contextlib.contextmanager
def writer_lock(folder: Path, name: str | None = None) -> Iterator[None]:
    """Hold the lock of a folder while the block runs; the system releases it if the process dies.

    Args:
        folder: whose lock it is.
        name: of what is written, for the message; the folder if None.

    Raises:
        ValueError: another process holds the lock; the message names its process id. Or no file stands in its place.
    """
    path = folder / LOCK_NAME
    with contextlib.ExitStack() as stack:
        try:
            descriptor = stack.enter_context(locked(path))
        except BlockingIOError:
            holder = ""
            with contextlib.suppress(FileNotFoundError, ValueError):  # released meanwhile, or damaged
                holder = read_text(path, 100).strip()
            holder = holder if re.fullmatch(r"process \d+", holder) else ""
            raise ValueError(
                f"{name or folder} is being written by {holder or 'another process'}; wait for it or choose another "
                "folder"
            ) from None
        require_file(path)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()}".encode())
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
