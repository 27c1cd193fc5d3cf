"""What probing has found of a source: a plan of its windows, or the reason why it is rejected."""

import dataclasses
from typing import Any

from wan_data.curation.measures import Measures
from wan_data.index.records import REJECTED
from wan_data.storage.location import Location
from wan_data.video.buckets import Size
from wan_data.video.decode import ClipInfo
from wan_data.video.windows import Window


@dataclasses.dataclass(frozen=True)
class PlannedSource:
    """An accepted source with the windows that become samples.

    Attributes:
        name: see ``wan_data.sources.source.SourceFile``.
        path: the file, or the object of a store.
        bytes, sha256: size and digest of the file.
        caption: the caption of all its samples.
        info: properties found by decoding it completely.
        size: the bucket that its frames are resized to.
        windows: frame ranges at the target rate, one sample each.
        mtime_ns: modification time of the file before it was read; 0 if unknown.
        measures: of the clip; None if it was not measured.
        duplicate_of: the name of the source that it is a near-duplicate of, or None.
    """

    name: str
    path: Location
    bytes: int
    sha256: str
    caption: str
    info: ClipInfo
    size: Size
    windows: tuple[Window, ...]
    mtime_ns: int = 0
    measures: Measures | None = None
    duplicate_of: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The source as plain JSON values, of which ``from_json`` makes it again."""
        value = dataclasses.asdict(self)
        value["windows"] = [[window.start, window.stop] for window in self.windows]
        return {**value, "path": str(self.path)}


@dataclasses.dataclass(frozen=True)
class RejectedSource:
    """A source that cannot be used, or is left out because the user asked for it.

    Attributes:
        name: see ``wan_data.sources.source.SourceFile``.
        reason: why, as the end of a sentence about it.
        bytes, sha256: size and digest of the file, as far as they are known.
        verdict: of ``wan_data.index.records``: ``rejected``, or one of ``LEFT_OUT``.
        info, mtime_ns, measures, duplicate_of: of one that is left out: see ``PlannedSource``.
    """

    name: str
    reason: str
    bytes: int = 0
    sha256: str | None = None
    verdict: str = REJECTED
    info: ClipInfo | None = None
    mtime_ns: int = 0
    measures: Measures | None = None
    duplicate_of: str | None = None


ProbeResult = PlannedSource | RejectedSource
