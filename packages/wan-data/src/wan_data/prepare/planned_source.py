"""What probing has found of a source: a plan of its windows, or the reason why it is rejected."""

import dataclasses
from pathlib import Path
from typing import Any

from wan_data.video.buckets import Size
from wan_data.video.decode import ClipInfo
from wan_data.video.windows import Window


@dataclasses.dataclass(frozen=True)
class PlannedSource:
    """An accepted source with the windows that become samples.

    Attributes:
        name: see ``wan_data.sources.source.SourceFile``.
        path: the file.
        bytes, sha256: size and digest of the file.
        caption: the caption of all its samples.
        info: properties found by decoding it completely.
        size: the bucket that its frames are resized to.
        windows: frame ranges at the target rate, one sample each.
        mtime_ns: modification time of the file before it was read; 0 if unknown.
    """

    name: str
    path: Path
    bytes: int
    sha256: str
    caption: str
    info: ClipInfo
    size: Size
    windows: tuple[Window, ...]
    mtime_ns: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The source as plain JSON values, of which ``from_json`` makes it again."""
        value = dataclasses.asdict(self)
        value["windows"] = [[window.start, window.stop] for window in self.windows]
        return {**value, "path": str(self.path)}


@dataclasses.dataclass(frozen=True)
class RejectedSource:
    """A source that cannot be used, with the reason."""

    name: str
    reason: str
    bytes: int = 0
    sha256: str | None = None


ProbeResult = PlannedSource | RejectedSource
