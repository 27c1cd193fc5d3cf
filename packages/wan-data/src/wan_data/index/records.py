"""What the index holds: a record of each source, and of each of its files."""

import dataclasses
import fnmatch
from collections.abc import Mapping

ACCEPTED, REJECTED, REMOVED = VERDICTS = ("accepted", "rejected", "removed")
PART_PATTERN = "sources-{number:06d}.sqlite"
PART_GLOB = "sources-*.sqlite"


@dataclasses.dataclass(frozen=True, slots=True)
class SourceRecord:
    """A source of the dataset.

    Attributes:
        path: relative to the input folder, with forward slashes.
        verdict: ``accepted`` or ``rejected``; in a file of the index also ``removed``, which hides earlier records.
        reason: the reason of a rejection, else None.
        split: the split of its samples; None if it was rejected.
        sha256: digest of the file; None if it could not be read.
        bytes: size of the file.
        samples: number of its samples; their keys are ``wan_data.shards.writer.sample_key`` of the path.
        shards: names of the shards that hold its samples.
        dropped: number and reason of each window that could not be encoded.
        frames: number of frames at the target rate; 0 if it was rejected.
        source_fps: frame rate of the file.
        height, width: pixels as displayed.
        caption_tokens: tokens of a caption that was cut, because the text encoder takes fewer; else None.
        caption_sha256: digest of the caption; None if it was rejected, or encoded by a version that did not record it.
    """

    path: str
    verdict: str
    reason: str | None = None
    split: str | None = None
    sha256: str | None = None
    bytes: int = 0
    samples: int = 0
    shards: tuple[str, ...] = ()
    dropped: tuple[tuple[int, str], ...] = ()
    frames: int = 0
    source_fps: float = 0.0
    height: float = 0.0
    width: float = 0.0
    caption_sha256: str | None = None
    caption_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class PartRecord:
    """A file of the index.

    Attributes:
        name: of the file, which is never written again.
        records: number of its records.
        digest: SHA-256 of the records, whatever version of SQLite has written them.
    """

    name: str
    records: int
    digest: str


@dataclasses.dataclass(frozen=True)
class SourceCounts:
    """How many sources a dataset has.

    Attributes:
        accepted: by split.
        rejected: the others.
        dropped: those of the accepted of which some windows could not be encoded.
    """

    accepted: Mapping[str, int] = dataclasses.field(default_factory=dict)
    rejected: int = 0
    dropped: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.accepted.values()) + self.rejected


def is_notable(record: SourceRecord) -> bool:
    """Whether something of a source was left out: all of it, windows, or the end of its caption."""
    return record.verdict == REJECTED or bool(record.dropped) or record.caption_tokens is not None


def is_part_name(name: str) -> bool:
    """Whether a file of the index may have this name; it leads to no other folder."""
    return fnmatch.fnmatchcase(name, PART_GLOB) and "/" not in name and "\0" not in name
