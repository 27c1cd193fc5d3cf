"""Results of the forked checkpoint writers, passed to their parent process; used without CUDA.

Megatron-Core starts a manager process for that, a new interpreter that imports torch: five CPU seconds per rank at its
first save. An unnamed temporary file, which forks share, does the same.
"""

import functools
import os
import pickle
import queue
import tempfile
from typing import Any

_LENGTH_BYTES = 8


class WriteResults:
    """A queue between a process and its forks, one of which writes at a time; items are available immediately."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  closed by ``close``
        self._read = 0

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def put(self, item: Any) -> None:
        """Append a value."""
        content = pickle.dumps(item)
        content = len(content).to_bytes(_LENGTH_BYTES, "little") + content
        # Forks share the file's position, so pwrite is used.
        end = os.fstat(self._file.fileno()).st_size
        while content:
            written = os.pwrite(self._file.fileno(), content, end)
            content, end = content[written:], end + written

    def get_nowait(self) -> Any:
        """Remove and return the oldest item.

        Raises:
            queue.Empty: there is none.
        """
        begin = self._read + _LENGTH_BYTES
        end = begin + int.from_bytes(self._bytes(self._read, begin), "little")
        # Safe: only this process's own forks write to the file.
        item = pickle.loads(self._bytes(begin, end))
        self._read = end
        if end == os.fstat(self._file.fileno()).st_size:
            os.ftruncate(self._file.fileno(), 0)
            self._read = 0
        return item

    def _bytes(self, begin: int, end: int) -> bytes:
        content = b""
        while begin + len(content) < end:
            part = os.pread(self._file.fileno(), end - begin - len(content), begin + len(content))
            if not part:
                raise queue.Empty
            content += part
        return content


@functools.cache
def results_of_process() -> WriteResults:
    """The queue of this process, created before it forks writers."""
    return WriteResults()
