"""How the writers of a checkpoint tell the process that forked them what they wrote, where there is no CUDA.

Megatron-Core starts a server for that, a fresh interpreter that imports torch: five seconds of a core for every process
of a run, at its first save. A file without a name does it too: forks share it.
"""

import functools
import os
import pickle
import queue
import tempfile
from typing import Any

_LENGTH_BYTES = 8


class WriteResults:
    """A queue between a process and its forks, of which one writes at a time; whatever is put can be got at once."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  it is there as long as this is
        self._read = 0

    def close(self) -> None:
        """Give the file up."""
        self._file.close()

    def put(self, item: Any) -> None:
        """Append a value."""
        content = pickle.dumps(item)
        content = len(content).to_bytes(_LENGTH_BYTES, "little") + content
        # The forks share the file's position, so it is not used.
        end = os.fstat(self._file.fileno()).st_size
        while content:
            written = os.pwrite(self._file.fileno(), content, end)
            content, end = content[written:], end + written

    def get_nowait(self) -> Any:
        """The oldest value that was not got.

        Raises:
            queue.Empty: there is none.
        """
        begin = self._read + _LENGTH_BYTES
        end = begin + int.from_bytes(self._bytes(self._read, begin), "little")
        # From our own forks alone: nothing of it has been anywhere else.
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
    """The one of this process, made before it forks writers."""
    return WriteResults()
