"""The manifest ``wan-data.json`` beside the shards: settings, latent space, shards and counts of a dataset.

It is all that training reads; the index, which it lists the files of, has the sources. Writing it makes a new state of
the dataset visible at once: every file that it names is complete before, and none is changed after.
"""

import contextlib
import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from wan_data.index.lengths import SplitLengths
from wan_data.index.part import Part, remedy_named
from wan_data.index.records import (
    ACCEPTED,
    REJECTED,
    SourceRecord,
    is_part_name,
)
from wan_data.index.sources import IndexState, SourceIndex, counted
from wan_data.shards.database import damage_named
from wan_data.shards.json_records import from_json
from wan_data.shards.writer import ShardRecord, is_shard_name
from wan_data.storage.files import is_file, read_json
from wan_data.storage.location import Location
from wan_model.latent_spec import LatentSpec
from wan_model.system.files import write_bytes

MANIFEST_NAME = "wan-data.json"
# Bytes; a shard has some two hundred. In format 1 a source had some three hundred.
_LARGEST = 4 << 30
FORMAT_VERSION = 2
# In which one file listed the sources too; wan-data upgrade, and prepare, turn such a dataset into the new one.
EARLIER_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class ShapeCount:
    """Samples of one shape in one split.

    Attributes:
        split: the split.
        frames, height, width: of the video, in frames and pixels.
        latent: shape [C, F, H, W] of the latent.
        tokens: tokens a sample with the model's patch of (1, 2, 2).
        samples: number of samples.
    """

    split: str
    frames: int
    height: int
    width: int
    latent: tuple[int, int, int, int]
    tokens: int
    samples: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of the file; ``complete`` is False until the first batch of shards is finished.

    Attributes:
        complete: whether the dataset can be read.
        wan_data_version: that has begun it.
        latent_spec, settings: of all samples.
        index: of the sources; see ``open_sources``.
        shards, shapes: all of them.
        lengths: of the samples' texts; None if they are not known, as of format 1.
        next_shard: number of the next shard.
        empty_caption: the sha256 of the file with the embedding of the empty caption
            (``wan_data.reading.empty_caption``).
        format_version: of the file that it was read from.
    """

    complete: bool
    wan_data_version: str
    latent_spec: LatentSpec
    settings: Mapping[str, Any]
    index: IndexState = dataclasses.field(default_factory=IndexState)
    shards: tuple[ShardRecord, ...] = ()
    shapes: tuple[ShapeCount, ...] = ()
    lengths: tuple[SplitLengths, ...] | None = ()
    next_shard: int = 0
    empty_caption: str | None = None
    format_version: int = FORMAT_VERSION

    @property
    def settings_fingerprint(self) -> str:
        """A digest of the settings; with equal settings equal files become equal shards."""
        text = json.dumps(self.settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def samples(self) -> dict[str, int]:
        """Number of samples of each split."""
        counts: dict[str, int] = {}
        for shard in self.shards:
            counts[shard.split] = counts.get(shard.split, 0) + shard.samples
        return counts

    def write(self, folder: Path) -> None:
        """Write the manifest into a dataset's folder."""
        assert self.format_version == FORMAT_VERSION, "a dataset of an earlier format is upgraded first"
        value = dataclasses.asdict(dataclasses.replace(self, shards=()))
        value |= {
            "latent_spec": self.latent_spec.to_dict(),
            "latent_fingerprint": self.latent_spec.fingerprint,
            "settings_fingerprint": self.settings_fingerprint,
            "samples": self.samples,
        }
        lines = {key: json.dumps(one, ensure_ascii=False, indent=1, sort_keys=True) for key, one in value.items()}
        # A line each, without the names of the fields: there may be a hundred thousand.
        shards = [json.dumps(_shard_row(shard)) for shard in self.shards]
        lines["shards"] = "[\n" + ",\n".join(shards) + "\n]" if shards else "[]"
        text = ",\n".join(f"{json.dumps(key)}: {line}" for key, line in sorted(lines.items()))
        write_bytes(folder / MANIFEST_NAME, f"{{\n{text}\n}}\n".encode())


def caption_digest(caption: str) -> str:
    """SHA-256 of a caption, as a ``SourceRecord`` holds it; of a damaged shard it may be no valid Unicode."""
    return hashlib.sha256(caption.encode("utf-8", "surrogatepass")).hexdigest()


def read_manifest(folder: Location, *, allow_incomplete: bool = False) -> Manifest:
    """Read the manifest of a dataset.

    Raises:
        ValueError: the manifest is missing, damaged, of another format version, or of a run that did not finish.
    """
    path, value = folder / MANIFEST_NAME, _read(folder)
    with _damage_named(path):
        names = [field.name for field in dataclasses.fields(Manifest)]  # the rest follows from these
        if value["format_version"] == EARLIER_FORMAT:
            counts = counted(_earlier_sources(value))
            value |= {"index": {"counts": dataclasses.asdict(counts)}, "lengths": None}
        if missing := [name for name in names if name not in value]:
            raise ValueError(f"it has no {', '.join(missing)}")
        shards = _shards_of(value["shards"])
        manifest = from_json(Manifest, {**{name: value[name] for name in names}, "shards": []}, "it")
        manifest = dataclasses.replace(manifest, shards=shards)
        if strange := [shard.name for shard in manifest.shards if not is_shard_name(shard.name)]:
            raise ValueError(f"it has {strange[0][:80]!r}, which is no name of a shard")
        if strange := [part.name for part in manifest.index.parts if not is_part_name(part.name)]:
            raise ValueError(f"it has {strange[0][:80]!r}, which is no name of a file of the index")
    if not (manifest.complete or allow_incomplete):
        raise ValueError(f"{folder} is incomplete: wan-data prepare did not finish; run it again")
    return manifest


def _shard_row(shard: ShardRecord) -> list[Any]:
    return [shard.name, shard.split, shard.samples, shard.bytes, shard.sha256]


def _shards_of(value: Any) -> tuple[ShardRecord, ...]:
    """The shards, as ``from_json`` reads them, in a tenth of its time and with names that other readers share."""
    shards = [_shard_of(row) for row in value] if isinstance(value, list) else [None]
    if None in shards:  # damaged, or of format 1
        return from_json(_Shards, {"shards": value}, "it").shards
    return tuple(shard for shard in shards if shard is not None)


def _shard_of(row: Any) -> ShardRecord | None:
    if not isinstance(row, list) or [*map(type, row)] != [str, str, int, int, str]:
        return None
    name, split, samples, size, digest = row
    if not (name.isascii() and split.isascii() and digest.isascii()):
        return None
    return ShardRecord(sys.intern(name), sys.intern(split), samples, size, digest)


@dataclasses.dataclass(frozen=True)
class _Shards:
    """What is in the file under this name."""

    shards: tuple[ShardRecord, ...]


def open_sources(folder: Location, manifest: Manifest) -> SourceIndex:
    """Open the index of the sources of a dataset.

    Args:
        folder: of the dataset.
        manifest: of it.

    Raises:
        ValueError: a file of the index is missing or damaged.
    """
    if manifest.format_version == FORMAT_VERSION:
        return SourceIndex.open(folder, manifest.index.parts)
    path = folder / MANIFEST_NAME
    with _damage_named(path):
        return SourceIndex([Part.of_records(_earlier_sources(_read(folder)), str(path))])


def _read(folder: Location) -> dict[str, Any]:
    path = folder / MANIFEST_NAME
    if not is_file(path):
        raise ValueError(f"{folder} has no {MANIFEST_NAME}: expected a folder that wan-data prepare wrote")
    value = read_json(path, _LARGEST)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}; expected an object")
    if value.get("format_version") not in (EARLIER_FORMAT, FORMAT_VERSION):
        raise ValueError(
            f"{path} is of format {value.get('format_version')}; this version reads {FORMAT_VERSION} and "
            f"{EARLIER_FORMAT}: install the version of wan-data that wrote it"
        )
    return value


def _earlier_sources(value: dict[str, Any]) -> tuple[SourceRecord, ...]:
    if "sources" not in value:
        raise ValueError("it has no sources")
    records = from_json(_Sources, {"sources": value["sources"]}, "it").sources
    if strange := [record.verdict for record in records if record.verdict not in (ACCEPTED, REJECTED)]:
        raise ValueError(f"it has a source of the verdict {strange[0][:80]!r}; expected {ACCEPTED} or {REJECTED}")
    return tuple({record.path: record for record in records}.values())


@dataclasses.dataclass(frozen=True)
class _Sources:
    """What format 1 lists beside the rest."""

    sources: tuple[SourceRecord, ...]


@contextlib.contextmanager
def _damage_named(path: Location) -> Iterator[None]:
    with remedy_named(), damage_named(str(path)):
        yield
