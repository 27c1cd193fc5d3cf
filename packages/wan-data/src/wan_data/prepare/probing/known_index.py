"""What indices know of sources, so that they are not decoded again: of this dataset, or of one replaced by it."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from wan_data.curation.fingerprints import unpacked_fingerprint
from wan_data.curation.measures import MEASURE_NAMES, Measures
from wan_data.index.records import SourceRecord
from wan_data.index.sources import SourceIndex
from wan_data.prepare.probing.cache import Found, ProbeCache
from wan_data.prepare.settings import PrepareSettings
from wan_data.video.decode import ClipInfo

# Settings by which the same file gets other properties, and by which it gets other measures.
_READING = (
    *("fps", "hdr", "reading_version"),
    *("max_source_frames", "max_source_pixels", "max_source_bytes", "max_source_still"),
)
_MEASURING = ("scenes", "background", "measures_version")


class KnownSources(ProbeCache):
    """The sources that are in the cache of earlier runs, or in an index.

    Args:
        path, settings: see ``ProbeCache``.
        indices: of datasets whose settings ``holds`` accepts; the first that knows a source counts.
    """

    def __init__(self, path: Path | None, settings: PrepareSettings, indices: Sequence[SourceIndex] = ()) -> None:
        super().__init__(path, settings)
        self._indices, self._measuring = indices, settings.measuring

    def find(self, names: Iterable[str]) -> dict[str, Found]:
        """See ``ProbeCache``."""
        names = list(names)
        known = super().find(names)
        for index in self._indices:
            for name, record in index.find(name for name in names if name not in known).items():
                if (found := found_of(record, measuring=self._measuring)) is not None:
                    known[name] = found
        return known


def holds(stored: Mapping[str, Any], settings: PrepareSettings) -> bool:
    """Whether what was found with the stored settings is what would be found with these."""
    wanted = settings.to_dict()
    stored = {**PrepareSettings().to_dict(), **stored}
    names = (*_READING, *(_MEASURING if settings.measuring else ()))
    return all(stored.get(name) == wanted[name] for name in names)


def found_of(record: SourceRecord, *, measuring: bool) -> Found | None:
    """What a record knows of its source; None if that is not enough."""
    if not (record.mtime_ns and record.orientation and record.sha256):
        return None
    measures = None
    if measuring:
        if record.fingerprint is None or record.sharpness is None or record.black_borders is None:
            return None
        values = {name: getattr(record, name) for name in MEASURE_NAMES}
        try:
            hashes = unpacked_fingerprint(record.fingerprint)
        except ValueError:
            return None
        measures = Measures(**values, cuts=record.cuts, hashes=hashes)
    info = ClipInfo(
        record.frames, record.source_frames, record.source_fps, record.height, record.width, record.orientation
    )
    return Found(record.bytes, record.mtime_ns, record.sha256, info, measures)
