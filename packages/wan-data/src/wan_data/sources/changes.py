"""What has changed of sources that are in a dataset already: their contents and captions."""

import concurrent.futures
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from wan_data.index.manifest import MANIFEST_NAME, caption_digest, read_manifest
from wan_data.index.records import ACCEPTED, SourceCounts, SourceRecord
from wan_data.index.sources import SourceIndex, batched, not_among
from wan_data.sources.captions import CaptionFinder
from wan_data.sources.listing import files_of_listing
from wan_data.sources.modification_times import SourceTimes
from wan_data.sources.source import SourceFile, caption_of
from wan_data.storage.files import is_there
from wan_data.storage.location import Location
from wan_model.system.files import sha256_of

# Missing sources that are named, unless all are asked for.
_NAMED = 1_000


@dataclasses.dataclass(frozen=True)
class SourceChanges:
    """How the sources differ from those that a dataset was made of.

    Attributes:
        changed: what has changed, in a sentence, by the name of each accepted source that is still there.
        missing_count: number of the accepted sources that are no longer there.
        missing: names of these, or of the first.
        new: number of sources that have no samples in the dataset.
    """

    changed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    missing_count: int = 0
    missing: tuple[str, ...] = ()
    new: int = 0


def find_changes(
    sources: Iterable[SourceFile],
    index: SourceIndex,
    counts: SourceCounts,
    times: SourceTimes,
    *,
    caption_key: str = "caption",
    readers: int = 1,
    all_missing: bool = False,
    begin: Callable[[int], None] = lambda total: None,
    step: Callable[[str], None] = lambda name: None,
) -> SourceChanges:
    """Compare the accepted sources of a dataset with the files of today: captions, sizes and contents.

    The content of a file is read only if its modification time is another one than is known of it.

    Args:
        sources: as ``prepare`` gets them; read several times.
        index: of the dataset.
        counts: of its sources.
        times: of the dataset; those of sources that have not changed are added.
        caption_key: of captions in JSON.
        readers: number of files that are read at a time.
        all_missing: name all missing sources, not only the first.
        begin: called with the number of files to read, if there are any.
        step: called with the name of each file that has been read.
    """
    captions = CaptionFinder(caption_key)
    changed: dict[str, list[str]] = {}
    unknown: list[tuple[SourceFile, int, str | None]] = []
    present = new = 0
    for chunk in batched(sources):
        records = {name: one for name, one in index.find(one.name for one in chunk).items() if one.verdict == ACCEPTED}
        known = times.find(records)
        for source in chunk:
            record = records.get(source.name)
            new += record is None
            if record is None or source.path is None:
                continue
            present += 1
            found: list[str] = []
            try:
                status = source.path.stat()
            except OSError as error:
                changed[source.name] = [f"cannot be read: {error.strerror or error}"]
                continue
            found += _changed_caption(source, record, captions)
            if status.st_size != record.bytes:
                found.append(f"has {status.st_size} bytes instead of {record.bytes}")
            elif known.get(source.name) != status.st_mtime_ns:
                unknown.append((source, status.st_mtime_ns, record.sha256))
            if found:
                changed[source.name] = found
    if unknown:
        begin(len(unknown))
    with concurrent.futures.ThreadPoolExecutor(readers) as pool:
        for some in batched(unknown):
            digests = pool.map(_digest_or_problem, [source.path for source, _, _ in some])
            same: dict[str, int] = {}
            for (source, time, before), digest in zip(some, digests, strict=True):
                if digest == before:
                    same[source.name] = time
                elif digest.startswith("cannot"):
                    changed.setdefault(source.name, []).append(digest)
                else:
                    changed.setdefault(source.name, []).append("has another content of the same size")
                step(source.name)
            times.put(same)
    missing = sum(counts.accepted.values()) - present
    most = missing if all_missing else min(missing, _NAMED)
    return SourceChanges(
        {name: f"{name} {' and '.join(found)}" for name, found in sorted(changed.items())},
        missing,
        tuple(itertools.islice(_missing(sources, index), most)) if most else (),
        new,
    )


def _missing(sources: Iterable[SourceFile], index: SourceIndex) -> Iterator[str]:
    """The accepted sources of a dataset that are not among these, both by name."""
    here = (source.name for source in sources if source.path is not None)
    return (record.path for record in not_among(index.accepted(), here))


def _changed_caption(source: SourceFile, record: SourceRecord, captions: CaptionFinder) -> Iterator[str]:
    if source.problem is not None:
        yield f"cannot be used any more: {source.problem}"
        return
    if record.caption_sha256 is None:  # of a version that did not record it
        return
    try:
        if caption_digest(caption_of(source, captions)) != record.caption_sha256:
            yield "has another caption"
    except ValueError as error:
        yield f"has lost its caption: {error}"


def _digest_or_problem(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def captions_of(dataset: Location, folder: Path, listing: Path | None) -> Callable[[str], str]:
    """The captions that the sources of a dataset have now, by their names.

    Args:
        dataset: with its manifest, which says the key of captions, and whether images are sources.
        folder: of the clips.
        listing: that has the captions; None if they are in files beside the clips.

    Raises:
        ValueError: the listing, or the manifest, cannot be read.
    """
    if not is_there(dataset / MANIFEST_NAME):  # of NVIDIA's script, which names no sources
        return lambda name: ""
    settings = read_manifest(dataset).settings
    key, images = str(settings.get("caption_key", "caption")), settings.get("mode") == "frames"
    finder = CaptionFinder(key)
    if listing is None:
        return lambda name: finder.find(folder / name)
    listed = files_of_listing(listing, folder, images=images, caption_key=key)

    def of_listing(name: str) -> str:
        source = listed.find(name)
        if source is None or source.problem is not None or source.path is None:
            raise ValueError(f"{listing} does not name it" if source is None else source.problem)
        return caption_of(source, finder)

    return of_listing
