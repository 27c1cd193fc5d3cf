"""The index of a dataset that is replaced, kept so that what is known of its sources is not found out again."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from wan_data.index.manifest import Manifest
from wan_data.index.records import PartRecord
from wan_data.index.sources import SourceIndex
from wan_data.prepare.work_files import WorkRecord

EARLIER_NAME = "earlier.json"


@dataclasses.dataclass(frozen=True)
class EarlierIndex(WorkRecord):
    """The index of a dataset that is replaced, whose files are in the folder of the unfinished preparation.

    Attributes:
        settings: of that dataset.
        parts: the files.
    """

    settings: Mapping[str, Any]
    parts: tuple[PartRecord, ...]


def keep_index(folder: Path, work: Path, manifest: Manifest) -> tuple[str, ...]:
    """Move the index of a dataset that is about to be replaced into the folder of the unfinished preparation.

    Returns:
        The names of the files there.
    """
    if not manifest.index.parts:
        return ()
    work.mkdir(exist_ok=True)
    for part in manifest.index.parts:
        (folder / part.name).rename(work / part.name)
    EarlierIndex(manifest.settings, manifest.index.parts).write(work / EARLIER_NAME)
    return EARLIER_NAME, *(part.name for part in manifest.index.parts)


@contextlib.contextmanager
def earlier_index(work: Path) -> Iterator[tuple[SourceIndex, Mapping[str, Any]] | None]:
    """The index that ``keep_index`` has kept, with its settings; None if there is none, or it is damaged."""
    with contextlib.ExitStack() as stack:
        found = None
        with contextlib.suppress(OSError, ValueError):  # it only saves time
            earlier = EarlierIndex.read(work / EARLIER_NAME)
            found = stack.enter_context(SourceIndex.open(work, earlier.parts)), earlier.settings
        yield found
