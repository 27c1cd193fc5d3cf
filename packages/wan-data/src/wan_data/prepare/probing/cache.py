"""What earlier runs have found of sources, so that a resumed preparation does not decode unchanged ones again."""

import contextlib
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

from wan_data.curation.measures import MEASURES_VERSION, Measures
from wan_data.prepare.settings import PrepareSettings
from wan_data.shards.database import ValueFile
from wan_data.shards.json_records import from_json
from wan_data.video.decode import ClipInfo
from wan_data.video.limits import READING_VERSION


@dataclasses.dataclass(frozen=True)
class Found:
    """What decoding a source completely has found, which holds while its file is unchanged.

    Attributes:
        bytes, mtime_ns: size and modification time of the file.
        sha256: its digest.
        info: properties of the clip.
        measures: of the clip; None if it was not measured.
    """

    bytes: int
    mtime_ns: int
    sha256: str
    info: ClipInfo
    measures: Measures | None = None


class ProbeCache:
    """The sources that earlier runs have decoded.

    Args:
        path: the file; None disables the cache. A damaged one is begun anew.
        settings: entries that were made with another rate, other limits or another version are ignored, and if sources
            are measured, also those without measures, or with cuts of another detector.
    """

    def __init__(self, path: Path | None, settings: PrepareSettings) -> None:
        self._file = None if path is None else ValueFile(path)
        conditions = [READING_VERSION, str(settings.fps), settings.hdr, *dataclasses.astuple(settings.limits)]
        self._conditions = json.loads(json.dumps(conditions))
        self._measured = [MEASURES_VERSION, settings.scenes, settings.background] if settings.measuring else None

    def find(self, names: Iterable[str]) -> dict[str, Found]:
        """What is known of those sources that are known; they may have changed since."""
        known: dict[str, Found] = {}
        for name, value in ({} if self._file is None else self._file.find(names)).items():
            with contextlib.suppress(ValueError, KeyError):
                if not isinstance(value, dict) or value.pop("about") != self._conditions:
                    continue
                measured = value.pop("measured", None)
                if self._measured is None:
                    value["measures"] = None  # what is known does not change what is recorded
                elif measured != self._measured:
                    continue
                known[name] = from_json(Found, value, "it")
        return known

    def add(self, name: str, found: Found) -> None:
        """Remember a source."""
        if self._file is not None:
            about = {"about": self._conditions, "measured": self._measured}
            self._file.put({name: {**dataclasses.asdict(found), **about}})

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
