"""What has changed of sources that are in a dataset already: their contents and captions."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from wan_data.index.manifest import MANIFEST_NAME, caption_digest, read_manifest
from wan_data.index.records import ACCEPTED, SourceCounts, SourceRecord
from wan_data.index.sources import SourceIndex, batched, not_among
from wan_data.sources.captions import CaptionFinder
from wan_data.sources.contents import Status, content_of, status_of
from wan_data.sources.listing import files_of_listing
from wan_data.sources.modification_times import SourceTimes
from wan_data.sources.source import SourceFile, caption_of
from wan_data.storage.failures import is_of_the_object
from wan_data.storage.files import is_there
from wan_data.storage.local_copies import LocalCopies
from wan_data.storage.location import Location, StorePath, location
from wan_data.video.source_file import Rejected
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
    copies: LocalCopies,
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
        copies: for the contents of objects.
        caption_key: of captions in JSON.
        readers: number of files that are read at a time.
        all_missing: name all missing sources, not only the first.
        begin: called with the number of files to read, if there are any.
        step: called with the name of each file that has been read.
    """
    captions = CaptionFinder(caption_key)
    changed: dict[str, list[str]] = {}
    unknown: list[tuple[SourceFile, Status, str | None]] = []
    present = new = 0
    with concurrent.futures.ThreadPoolExecutor(readers) as pool, _stopping(copies):
        for chunk in batched(sources):
            found = index.find(one.name for one in chunk)
            records = {name: one for name, one in found.items() if one.verdict == ACCEPTED}
            new += sum(source.name not in records for source in chunk)
            here = [(source, records[source.name]) for source in chunk if source.name in records and source.path]
            present += len(here)
            known = times.find([*records, *(one for source, _ in here if (one := _texts_name(source)))])
            stored = any(isinstance(source.path, StorePath) for source, _ in here)
            looks = (pool.map if stored else map)(functools.partial(_looked_at, captions=captions, known=known), here)
            same: dict[str, int] = {}
            for (source, record), look in zip(here, looks, strict=True):
                if look.status is not None and not look.sizes and known.get(source.name) != look.status.mtime_ns:
                    unknown.append((source, look.status, record.sha256))
                if look.captions or look.sizes:
                    changed[source.name] = [*look.captions, *look.sizes]
                if (name := _texts_name(source)) and not look.captions:
                    same[name] = _texts_stamp(source)
            times.put(same)
        if unknown:
            begin(len(unknown))
        for some in batched(unknown):
            equal: dict[str, int] = {}
            digests = pool.map(functools.partial(_digest_or_problem, copies=copies), some)
            for (source, status, before), digest in zip(some, digests, strict=True):
                if digest == before:
                    equal[source.name] = status.mtime_ns
                elif digest.startswith("cannot"):
                    changed.setdefault(source.name, []).append(digest)
                else:
                    changed.setdefault(source.name, []).append("has another content of the same size")
                step(source.name)
            times.put(equal)
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


@contextlib.contextmanager
def _stopping(copies: LocalCopies) -> Iterator[None]:
    """Let no thread wait for a download when the block ends with an error."""
    try:
        yield
    except BaseException:
        copies.stop()
        raise


@dataclasses.dataclass(frozen=True)
class _Look:
    """What is seen of a source without its content.

    Attributes:
        status: None if it cannot be read.
        captions, sizes: what of its caption, or of its size, has changed; or why it cannot be read.
    """

    status: Status | None
    captions: list[str]
    sizes: list[str]


def _looked_at(item: tuple[SourceFile, SourceRecord], captions: CaptionFinder, known: Mapping[str, int]) -> _Look:
    source, record = item
    try:
        status = status_of(source)
    except (OSError, Rejected) as error:
        return _Look(None, [], [_unreadable(error)])
    sizes = [] if status.bytes == record.bytes else [f"has {status.bytes} bytes instead of {record.bytes}"]
    if (name := _texts_name(source)) and known.get(name) == _texts_stamp(source):
        return _Look(status, [], sizes)
    return _Look(status, list(_changed_caption(source, record, captions)), sizes)


def _texts_name(source: SourceFile) -> str:
    """Under which the state of the texts beside an object is remembered; empty for a file, whose texts are read."""
    return f"{source.name}/texts" if source.listed is not None else ""  # no source has such a name


def _texts_stamp(source: SourceFile) -> int:
    """A number that is another one when these texts change: each is a request, and most stay as they are."""
    assert source.listed is not None
    texts = [(str(one.path), one.bytes, one.mtime_ns) for one in source.listed.texts]
    return int.from_bytes(hashlib.sha256(json.dumps(texts).encode()).digest()[:7], "big")


def _unreadable(error: OSError | Rejected) -> str:
    if isinstance(error, OSError) and not is_of_the_object(error):
        raise error  # of the store: nothing is known of the source
    return f"cannot be read: {(error.strerror if isinstance(error, OSError) else None) or error}"


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
    except OSError as error:  # of a store
        yield f"has a caption that {_unreadable(error)}"


def _digest_or_problem(item: tuple[SourceFile, Status, str | None], copies: LocalCopies) -> str:
    source, status, _ = item
    assert source.path is not None
    try:
        with content_of(source.path, status, copies) as file:
            return sha256_of(file)
    except OSError as error:
        return _unreadable(error)


def captions_of(dataset: Location, folder: Path, listing: Path | None) -> Callable[[str], str]:
    """The captions that the sources of a dataset have now, by their names.

    Args:
        dataset: with its manifest, which says the key of captions, and whether images are sources.
        folder: of the clips.
        listing: that has the captions; None if they are in files beside the clips.

    Raises:
        ValueError: the listing, or the manifest, cannot be read, or the folder or the listing is in a store.
    """
    for name, place in (("--sources", folder), ("--listing", listing)):
        if place is not None and isinstance(found := location(place), StorePath):
            raise ValueError(f"{name} {found} is in a store; copy it to a disk, and name the copy")
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
