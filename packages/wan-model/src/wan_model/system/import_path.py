"""Keeps the working folder, which may hold downloaded files, out of the import path of the processes of a command."""

import contextlib
import os
from collections.abc import Iterator

_SAFE_PATH = "PYTHONSAFEPATH"


@contextlib.contextmanager
def safe_import_path() -> Iterator[None]:
    """In this context, Python processes that are started do not import modules from the working folder.

    The helpers of ``multiprocessing`` (its fork server, its resource tracker, spawned processes) run ``python -c``,
    which imports from there first, unless this process itself was started with ``-P``; a script that pip has written is
    not. Python ignores the variable in processes that ``python -E`` starts.
    """
    before = os.environ.get(_SAFE_PATH)
    os.environ[_SAFE_PATH] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_SAFE_PATH, None)
        else:
            os.environ[_SAFE_PATH] = before
