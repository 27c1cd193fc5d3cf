"""The files of an unfinished preparation, which the next run resumes from."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Self, TypeVar

from wan_data.shards.json_records import from_json
from wan_model.system.files import write_json
from wan_model.system.safe_reading import read_json, require_file

# Bytes; those that list the sources have up to a thousand for each.
LARGEST = 4 << 30
T = TypeVar("T")
_EARLIER_PLAN = "round.json"


def read_work_file(path: Path, kind: type[T]) -> T:
    """The content of such a file.

    Args:
        path: of the file.
        kind: what it holds; see ``from_json``.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: it is damaged; the message says what to do.
    """
    with remedy_named():
        return from_json(kind, read_json(path, LARGEST), str(path))


class WorkRecord:
    """Base of a dataclass that stands in a file of an unfinished preparation."""

    def write(self, path: Path) -> None:
        """Write the record into the folder of an unfinished preparation."""
        write_json(path, dataclasses.asdict(self))  # type: ignore[call-overload]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Inverse of ``write``.

        Raises:
            ValueError: the file is damaged.
        """
        return read_work_file(path, cls)


@contextlib.contextmanager
def remedy_named(remedy: str = "remove it") -> Iterator[None]:
    """Add to a ``ValueError`` about a damaged file what to do."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}; {remedy} and run the same command again") from None


def check_work_folder(folder: Path) -> None:
    """Refuse what is no file, such as named pipes and folders, and the plan of a version that wrote it differently.

    Raises:
        ValueError: there is such a thing; the message says what to do.
    """
    if (folder / _EARLIER_PLAN).exists():
        raise ValueError(
            f"{folder / _EARLIER_PLAN} is the plan of an earlier version; finish the preparation with that version, or "
            f"remove the folder {folder} and run the same command again"
        )
    for path in sorted(folder.iterdir()):
        with remedy_named(), contextlib.suppress(FileNotFoundError):
            require_file(path)
