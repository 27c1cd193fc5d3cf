"""Texts beside the clips of a folder: files, or small objects of a store that are read by need."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from wan_data.storage.location import Location, StorePath
from wan_data.storage.store import StoredObject, download, look
from wan_model.system.safe_reading import SMALL_FILE

_LONGEST_NAME = 200  # bytes; a file system takes no more than 255


class Texts:
    """What stands beside a clip and may have its caption.

    Args:
        clip: the file, or the object of a store.
        listed: of an object: the texts beside it.
    """

    def __init__(self, clip: Location, listed: Sequence[StoredObject] = ()) -> None:
        self._clip = clip
        self._listed = {found.path.name: found for found in listed}

    def stands(self, name: str) -> bool:
        """Whether there is something that reading takes for a caption, or refuses by name."""
        if isinstance(self._clip, StorePath):
            return name in self._listed
        path = self._clip.parent / name
        return path.exists() and not path.is_dir()

    def lists(self) -> list[str]:
        """The names of the lists of captions."""
        if isinstance(self._clip, StorePath):
            return sorted(name for name in self._listed if name.endswith(".jsonl"))
        return sorted(path.name for path in self._clip.parent.glob("*.jsonl"))

    @contextlib.contextmanager
    def open(self, name: str, most: int = SMALL_FILE) -> Iterator[Path]:
        """A text as a file of its name; a ``ValueError`` of the block names the object.

        Args:
            name: of the text.
            most: bytes of an object.

        Raises:
            ValueError: an object is larger, and is not downloaded.
            OSError: an object cannot be read.
        """
        if isinstance(self._clip, StorePath):
            with text_copy(self._listed[name], most) as path:
                yield path
        else:
            yield self._clip.parent / name


@contextlib.contextmanager
def text_copy(found: StoredObject | StorePath, most: int) -> Iterator[Path]:
    """A local file with the content and the name of an object; a ``ValueError`` of the block names the object.

    Args:
        found: the object.
        most: its bytes.

    Raises:
        ValueError: it is larger.
        OSError: it cannot be downloaded.
    """
    found = look(found) if isinstance(found, StorePath) else found
    if found.bytes > most:
        raise ValueError(f"{found.path} has {found.bytes:,} bytes; expected at most {most:,}")
    with tempfile.TemporaryDirectory(prefix="wan-data-") as folder:
        name = found.path.name
        file = Path(folder) / (name if len(name.encode()) <= _LONGEST_NAME else f"text{found.path.suffix}")
        download(found, file)
        try:
            yield file
        except ValueError as error:
            if str(file) not in str(error):
                raise
            raise ValueError(str(error).replace(str(file), str(found.path))) from None
