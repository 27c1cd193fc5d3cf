"""What the index holds: a record of each source, and of each of its files."""

import dataclasses
import fnmatch
from collections.abc import Mapping

ACCEPTED, REJECTED, REMOVED = "accepted", "rejected", "removed"
# Left out because the user asked for it: by --where, and by --duplicates drop.
UNSELECTED, DUPLICATE = LEFT_OUT = "unselected", "duplicate"
PART_PATTERN = "sources-{number:06d}.sqlite"
PART_GLOB = "sources-*.sqlite"


@dataclasses.dataclass(frozen=True, slots=True)
class SourceRecord:
    """A source of the dataset.

    Attributes:
        path: relative to the input folder, with forward slashes.
        verdict: ``accepted``, ``rejected``, ``unselected`` (by ``--where``) or ``duplicate`` (by ``--duplicates
            drop``); in a file of the index also ``removed``, which hides earlier records.
        reason: why it is not accepted, else None.
        split: the split of its samples; None if it has none.
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
        source_frames, orientation: frames and EXIF orientation of the file; 0 if not known.
        mtime_ns: modification time of the file when it was decoded, of a source that was measured or left out; else 0.
        motion, stillness, sharpness, black_borders, cuts: see ``wan_data.curation.measures.Measures``; None if not
            measured.
        fingerprint: of ``wan_data.curation.fingerprints.packed_fingerprint``; None if it was not measured.
        duplicate_of: the path of the source that it is a near-duplicate of; None if it is none, or none was looked for.
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
    source_frames: int = 0
    orientation: int = 0
    mtime_ns: int = 0
    motion: float | None = None
    stillness: float | None = None
    sharpness: float | None = None
    black_borders: float | None = None
    cuts: tuple[int, ...] | None = None
    fingerprint: str | None = None
    duplicate_of: str | None = None


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
        rejected: those that cannot be used.
        dropped: those of the accepted of which some windows could not be encoded.
        unselected: those that ``--where`` left out.
        duplicates: those that ``--duplicates drop`` left out.
    """

    accepted: Mapping[str, int] = dataclasses.field(default_factory=dict)
    rejected: int = 0
    dropped: int = 0
    unselected: int = 0
    duplicates: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.accepted.values()) + self.rejected + self.unselected + self.duplicates


def is_notable(record: SourceRecord) -> bool:
    """Whether something is to be said of a source: it is left out, in whole or in part, or is a near-duplicate."""
    left_out = record.verdict in (REJECTED, *LEFT_OUT) or bool(record.dropped)
    return left_out or record.caption_tokens is not None or record.duplicate_of is not None


def is_part_name(name: str) -> bool:
    """Whether a file of the index may have this name; it leads to no other folder."""
    return fnmatch.fnmatchcase(name, PART_GLOB) and "/" not in name and "\0" not in name
