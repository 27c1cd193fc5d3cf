"""The modification times of a dataset's sources, from which ``wan-data prepare`` sees which of them to read again.

They stand beside the index and not in it, because they differ between copies of the same files. Without them, or where
a time differs, the digest of a file is compared.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from wan_data.shards.database import ValueFile

TIMES_NAME = "source-times.sqlite"
EARLIER_TIMES_NAME = "source-times.json"  # of datasets of format 1


class SourceTimes:
    """The times, in a file that only saves time.

    Args:
        file: None if something else has its name, and nothing is remembered.
    """

    def __init__(self, file: ValueFile | None) -> None:
        self._file = file

    def find(self, names: Iterable[str]) -> dict[str, int]:
        """Modification time in ns of those sources that it is known of, by name."""
        found = {} if self._file is None else self._file.find(names)
        return {name: time for name, time in found.items() if type(time) is int}

    def put(self, times: Mapping[str, int]) -> None:
        """Remember these times too."""
        if self._file is not None and times:
            self._file.put(times)


@contextlib.contextmanager
def source_times(folder: Path) -> Iterator[SourceTimes]:
    """The times of the sources of a dataset, whose folder no other process writes."""
    path = folder / TIMES_NAME
    if os.path.lexists(path) and not path.is_file():
        yield SourceTimes(None)
        return
    with contextlib.closing(ValueFile(path)) as file:
        yield SourceTimes(file)
