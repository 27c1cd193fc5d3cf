"""``wan-data verify``: compare a dataset with its manifest, byte by byte and value by value."""

import collections
import contextlib
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from wan_data.index.manifest import MANIFEST_NAME, Manifest, caption_digest, open_sources, read_manifest
from wan_data.index.part import Part
from wan_data.index.records import PART_GLOB
from wan_data.index.sources import SourceIndex
from wan_data.reading.empty_caption import EMPTY_CAPTION_NAME, read_empty_caption
from wan_data.shards.energon_index import index_problems
from wan_data.shards.energon_metadata import META_FOLDER, check_metadata, shard_counts
from wan_data.shards.reader import StoredSample, samples_of
from wan_data.shards.writer import SHARD_GLOB, sample_key
from wan_data.sources.source import place_of
from wan_data.storage.failures import UnusableCredentialsError, is_of_the_object
from wan_data.storage.files import as_local, file_size, is_there, names_like, sha256_of
from wan_data.storage.location import Location
from wan_model.system.safe_reading import require_file

_NUMBERS = ("frame_start", "processed_frames", "processed_height", "processed_width")


def verify(
    folder: Location,
    *,
    sources: Path | None = None,
    caption_of: Callable[[str], str] | None = None,
    step: Callable[[str], None] = lambda name: None,
) -> tuple[dict[str, int], list[str]]:
    """Read every file of a dataset and check it.

    Shards: size, digest, every member decodable without running code, finite values, shapes that agree with the side
    information, keys that belong to their sources and are unique. Metadata: Energon's counts, splits and indices.
    Manifest: samples of every source, shape and shard. A dataset without a manifest (of NVIDIA's own script) is read
    and counted.

    Args:
        folder: the dataset, on a disk or in a store, from which a shard is read three times.
        sources: the folder that it was made from, to compare the sources' digests too.
        caption_of: returns the caption that a source has now, by its name, or raises ``ValueError``.
        step: called with the name of each file that has been read.

    Returns:
        The number of checked objects of each kind, and the problems as sentences; none if the dataset is intact.
    """
    problems: list[str] = []
    checked: collections.Counter[str] = collections.Counter()
    with contextlib.ExitStack() as stack:
        try:
            manifest = read_manifest(folder) if is_there(folder / MANIFEST_NAME) else None
            splits = check_metadata(folder)
            counts = shard_counts(folder)
            index = None if manifest is None else stack.enter_context(open_sources(folder, manifest))
        except ValueError as error:
            return {}, [str(error)]
        if manifest is not None:
            problems += _metadata_problems(folder, manifest, splits, counts)
            problems += _index_problems(folder, manifest)
        found = stack.enter_context(contextlib.closing(_Comparison(manifest, index)))
        problems += index_problems(folder, folder / META_FOLDER, list(counts.items()))
        for name in sorted(counts):
            checked["shards"] += 1
            problems += _shard_problems(folder / name, counts[name], found)
            step(name)
        checked["samples"] = found.samples
        if manifest is not None and index is not None:
            problems += _empty_caption_problems(folder, manifest)
            try:
                problems += found.problems()
                if sources is not None:
                    for found_problems in _source_problems(index, sources, found.captions_of, caption_of, step):
                        checked["sources"] += 1
                        problems += found_problems
            except ValueError as error:  # the index is damaged
                problems.append(str(error))
    return dict(checked), problems


def _index_problems(folder: Location, manifest: Manifest) -> Iterator[str]:
    """What of the index is not as it was written; one of an earlier format has no digests."""
    for record in manifest.index.parts:
        try:
            with (
                as_local(folder / record.name) as copy,
                contextlib.closing(Part.open(copy.parent, record)) as part,
            ):
                if part.digest() != (record.records, record.digest):
                    yield f"{folder / record.name} holds other records than {MANIFEST_NAME} says: it is damaged"
        except FileNotFoundError:
            yield f"{folder / record.name} is missing, which {MANIFEST_NAME} names: the dataset is damaged"
        except ValueError as error:
            yield str(error)
    for name in names_like(folder, PART_GLOB):
        if name not in {part.name for part in manifest.index.parts}:
            yield f"{name} is no file of {MANIFEST_NAME}: delete it, an interrupted run has left it"


def _metadata_problems(
    folder: Location, manifest: Manifest, splits: Mapping[str, Sequence[str]], counts: Mapping[str, int]
) -> Iterator[str]:
    wanted = {shard.name: shard.samples for shard in manifest.shards}
    if counts != wanted:
        names = sorted(name for name in {*counts, *wanted} if counts.get(name) != wanted.get(name))
        yield (
            f"{META_FOLDER}/.info.json and {MANIFEST_NAME} do not agree on {', '.join(names[:3])}"
            f"{' and others' if len(names) > 3 else ''}: run wan-data prepare again, which rewrites both"
        )
    for name in names_like(folder, SHARD_GLOB):
        if name not in wanted:
            yield f"{name} is no shard of {MANIFEST_NAME}: delete it, an interrupted run has left it"
    for split in {*splits, *manifest.samples}:
        names_here = [shard.name for shard in manifest.shards if shard.split == split]
        if sorted(splits.get(split, [])) != sorted(names_here):
            yield f"{META_FOLDER}/split.yaml lists other shards for {split} than {MANIFEST_NAME}"


_TABLES = (
    "CREATE TABLE samples (key TEXT PRIMARY KEY, source TEXT, caption TEXT) WITHOUT ROWID",
    "CREATE INDEX by_source ON samples (source, caption)",
)


class _Comparison:
    """Collects the samples of the shards, in a temporary file because there may be many, and compares them."""

    def __init__(self, manifest: Manifest | None, index: SourceIndex | None) -> None:
        self.manifest, self._index = manifest, index
        self.samples = 0
        self.shards = {shard.name: shard for shard in manifest.shards} if manifest else {}
        self.by_shape: collections.Counter[tuple[str, tuple[int, ...]]] = collections.Counter()
        # Without a name, SQLite keeps it in its cache, and what is more in a file that it deletes.
        self._seen = sqlite3.connect("", isolation_level=None)
        self._seen.execute("PRAGMA synchronous = OFF")
        self._seen.execute("BEGIN")
        for statement in _TABLES:
            self._seen.execute(statement)

    def close(self) -> None:
        """Delete the temporary file."""
        self._seen.close()

    def captions_of(self, source: str) -> set[str]:
        """Digests of the captions that the samples of a source were encoded with."""
        query = "SELECT DISTINCT caption FROM samples WHERE source = ?"
        return {caption for (caption,) in self._seen.execute(query, [source])}

    def add(self, shard: str, sample: StoredSample) -> Iterator[str]:
        """Count a sample; yields its problems."""
        self.samples += 1
        where = f"shard {shard}, sample {sample.key}"
        caption = caption_digest(str(sample.info.get("caption")))
        try:
            self._seen.execute("INSERT INTO samples VALUES (?, NULL, ?)", (sample.key, caption))
        except sqlite3.IntegrityError:
            yield f"{where}: its key is in another shard too"
        info = sample.info
        if self.manifest is None or self._index is None:
            return
        source = str(info.get("video_path"))
        record = self._index.find([source]).get(source)
        if record is None or record.verdict != "accepted":
            yield f"{where}: its source {source!r} is not among those of the index"
            return
        if wrong := [name for name in _NUMBERS if type(info.get(name)) is not int]:
            yield f"{where}: its side information has no whole number for {', '.join(wrong)}"
            return
        if sample.key != sample_key(source, info["frame_start"]):
            yield f"{where}: its key is not that of its source and window"
        if info.get("source_sha256") != record.sha256:
            yield f"{where}: its source has another digest in the index"
        if info.get("latent_fingerprint") != self.manifest.latent_spec.fingerprint:
            yield f"{where}: it is of the latent space {info.get('latent_fingerprint')}"
        size = info["processed_frames"], info["processed_height"], info["processed_width"]
        try:
            wanted = self.manifest.latent_spec.latent_shape(*size)
        except ValueError as error:
            yield f"{where}: {error}"
            return
        if tuple(sample.latent.shape) != tuple(wanted):
            yield f"{where}: its latent is {tuple(sample.latent.shape)}; its side information says {tuple(wanted)}"
        if info.get("text_tokens") != sample.text.shape[0]:
            says = info.get("text_tokens")
            yield f"{where}: its text has {sample.text.shape[0]} tokens; its side information says {says}"
        self._seen.execute("UPDATE samples SET source = ? WHERE key = ?", (source, sample.key))
        if shard in self.shards:
            self.by_shape[self.shards[shard].split, tuple(sample.latent.shape)] += 1

    def problems(self) -> Iterator[str]:
        """Counts that differ from the manifest."""
        assert self.manifest is not None
        assert self._index is not None
        for record in self._index.records():
            query = "SELECT count(*) FROM samples WHERE source = ?"
            ((found,),) = self._seen.execute(query, [record.path])
            if record.samples != found:
                yield f"{record.path} has {found} samples; the index says {record.samples}"
        wanted: collections.Counter[tuple[str, tuple[int, ...]]] = collections.Counter()
        for shape in self.manifest.shapes:
            wanted[shape.split, shape.latent] += shape.samples
        for split, latent in sorted({*wanted, *self.by_shape}):
            if wanted[split, latent] != self.by_shape[split, latent]:
                yield (
                    f"there are {self.by_shape[split, latent]} samples of {latent} in {split}; "
                    f"{MANIFEST_NAME} says {wanted[split, latent]}"
                )


def _shard_problems(path: Location, count: int, found: _Comparison) -> Iterator[str]:
    record = found.shards.get(path.name)
    if record is not None:
        size = file_size(path)
        if size != record.bytes:
            yield f"shard {path.name} has {size} bytes; {MANIFEST_NAME} says {record.bytes}: it is damaged"
        elif (digest := sha256_of(path)) != record.sha256:
            yield (
                f"shard {path.name} has the digest {digest[:16]}; "
                f"{MANIFEST_NAME} says {record.sha256[:16]}: it is damaged"
            )
    samples = 0
    try:
        for sample in samples_of(path):
            samples += 1
            yield from found.add(path.name, sample)
    except (ValueError, OSError) as error:
        yield str(error)
        return
    if samples != count:
        yield f"shard {path.name} holds {samples} samples; {META_FOLDER}/.info.json counts {count}"


def _empty_caption_problems(folder: Location, manifest: Manifest) -> Iterator[str]:
    if manifest.empty_caption is None:
        return
    try:
        text = read_empty_caption(folder)
    except ValueError as error:
        yield str(error)
        return
    if text.shape[1] != manifest.latent_spec.text_dim:
        yield f"{EMPTY_CAPTION_NAME} is {text.shape[1]} wide; the dataset's texts are {manifest.latent_spec.text_dim}"


def _source_problems(
    index: SourceIndex,
    folder: Path,
    captions_of: Callable[[str], set[str]],
    caption_of: Callable[[str], str] | None,
    step: Callable[[str], None],
) -> Iterator[list[str]]:
    """Yield the changes of each accepted source since it was encoded.

    Raises:
        OSError, ValueError: the store of a source that a listing named by its URL fails, or takes no credentials.
    """
    for record in index.accepted():
        problems, place, is_here = [], place_of(folder, record.path), True
        try:
            if isinstance(place, Path):
                require_file(place)
            if sha256_of(place) != record.sha256:
                problems.append(f"{record.path} has changed since it was encoded")
        except ValueError as error:
            if isinstance(error.__cause__, UnusableCredentialsError):
                raise
            problems.append(str(error))
        except OSError as error:
            if not is_of_the_object(error):
                raise  # of its store, and no problem of the dataset
            is_here = isinstance(place, Path) and place.exists()
            problems.append(f"{record.path} cannot be read: {error.strerror or error}")
        if caption_of is not None and is_here:
            try:
                now = caption_digest(caption_of(record.path))
                if captions_of(record.path) - {now}:
                    problems.append(f"{record.path} has another caption than its samples were encoded with")
            except ValueError as error:
                problems.append(f"{record.path} has lost its caption: {error}")
        yield problems
        step(record.path)
