"""The manifest ``wan-data.json`` beside the shards: samples, sources, settings and latent space of a dataset."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan_data.shards.json_records import from_json
from wan_data.shards.writer import ShardRecord, is_shard_name
from wan_model.latent_spec import LatentSpec
from wan_model.system.files import write_json
from wan_model.weights.model_folder import read_json

MANIFEST_NAME = "wan-data.json"
# Bytes; a source has some three hundred.
_LARGEST = 4 << 30
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class SourceRecord:
    """A source of the dataset.

    Attributes:
        path: relative to the input folder, with forward slashes.
        verdict: ``accepted`` or ``rejected``.
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

    ``empty_caption`` is the sha256 of the file with the embedding of the empty caption
    (``wan_data.reading.empty_caption``).
    """

    complete: bool
    wan_data_version: str
    latent_spec: LatentSpec
    settings: Mapping[str, Any]
    sources: tuple[SourceRecord, ...] = ()
    shards: tuple[ShardRecord, ...] = ()
    shapes: tuple[ShapeCount, ...] = ()
    next_shard: int = 0
    empty_caption: str | None = None

    @property
    def settings_fingerprint(self) -> str:
        """A digest of the settings; with equal settings equal files become equal shards."""
        text = json.dumps(self.settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def accepted(self) -> dict[str, SourceRecord]:
        """The sources that have samples, by their paths."""
        return {record.path: record for record in self.sources if record.verdict == "accepted"}

    @property
    def samples(self) -> dict[str, int]:
        """Number of samples of each split."""
        counts: dict[str, int] = {}
        for shard in self.shards:
            counts[shard.split] = counts.get(shard.split, 0) + shard.samples
        return counts

    def write(self, folder: Path) -> None:
        """Write the manifest into a dataset's folder."""
        value = dataclasses.asdict(self)
        value |= {
            "format_version": FORMAT_VERSION,
            "latent_spec": self.latent_spec.to_dict(),
            "latent_fingerprint": self.latent_spec.fingerprint,
            "settings_fingerprint": self.settings_fingerprint,
            "samples": self.samples,
        }
        write_json(folder / MANIFEST_NAME, value)


def caption_digest(caption: str) -> str:
    """SHA-256 of a caption, as a ``SourceRecord`` holds it; of a damaged shard it may be no valid Unicode."""
    return hashlib.sha256(caption.encode("utf-8", "surrogatepass")).hexdigest()


def read_manifest(folder: Path, *, allow_incomplete: bool = False) -> Manifest:
    """Read the manifest of a dataset.

    Raises:
        ValueError: the manifest is missing, damaged, of another format version, or of a run that did not finish.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise ValueError(f"{folder} has no {MANIFEST_NAME}: expected a folder that wan-data prepare wrote")
    value = read_json(path, _LARGEST)
    if value.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path} is of format {value.get('format_version')}; this version reads {FORMAT_VERSION}")
    try:
        names = [field.name for field in dataclasses.fields(Manifest)]  # the rest follows from these
        if missing := [name for name in names if name not in value]:
            raise ValueError(f"it has no {', '.join(missing)}")
        manifest = from_json(Manifest, {name: value[name] for name in names}, "it")
        if strange := [shard.name for shard in manifest.shards if not is_shard_name(shard.name)]:
            raise ValueError(f"it has {strange[0][:80]!r}, which is no name of a shard")
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged: {error}; restore the file, or prepare the dataset again with --overwrite"
        ) from None
    if not (manifest.complete or allow_incomplete):
        raise ValueError(f"{folder} is incomplete: wan-data prepare did not finish; run it again")
    return manifest
