"""What has changed of sources that are in a dataset already: their contents and captions."""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from wan_data.shards.manifest import MANIFEST_NAME, Manifest, SourceRecord, caption_digest, read_manifest
from wan_data.sources.captions import CaptionFinder
from wan_data.sources.listing import files_of_listing
from wan_data.sources.source import SourceFile, caption_of
from wan_model.system.files import sha256_of


@dataclasses.dataclass(frozen=True)
class SourceChanges:
    """How the sources differ from those that a dataset was made of.

    Attributes:
        changed: what has changed, in a sentence, by the name of each accepted source that is still there.
        missing: names of the accepted sources that are no longer there.
        times: modification time in ns of each source whose content is known to be unchanged.
    """

    changed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    missing: tuple[str, ...] = ()
    times: Mapping[str, int] = dataclasses.field(default_factory=dict)


def find_changes(
    sources: Sequence[SourceFile],
    manifest: Manifest,
    times: Mapping[str, int],
    *,
    readers: int = 1,
    begin: Callable[[int], None] = lambda total: None,
    step: Callable[[str], None] = lambda name: None,
) -> SourceChanges:
    """Compare the accepted sources of a dataset with the files of today: captions, sizes and contents.

    The content of a file is read only if its modification time is another one than is known of it.

    Args:
        sources: as ``prepare`` gets them.
        manifest: of the dataset.
        times: of ``wan_data.sources.modification_times``.
        readers: number of files that are read at a time.
        begin: called with the number of files to read, if there are any.
        step: called with the name of each file that has been read.
    """
    records = manifest.accepted
    captions = CaptionFinder(str(manifest.settings.get("caption_key", "caption")))
    changed: dict[str, list[str]] = {}
    present: set[str] = set()
    same: dict[str, int] = {}
    unknown: list[tuple[SourceFile, int]] = []
    for source in sources:
        record = records.get(source.name)
        if record is None or source.path is None:
            continue
        present.add(source.name)
        found = changed.setdefault(source.name, [])
        try:
            status = source.path.stat()
        except OSError as error:
            found.append(f"cannot be read: {error.strerror or error}")
            continue
        found += _changed_caption(source, record, captions)
        if status.st_size != record.bytes:
            found.append(f"has {status.st_size} bytes instead of {record.bytes}")
        elif times.get(source.name) == status.st_mtime_ns:
            same[source.name] = status.st_mtime_ns
        else:
            unknown.append((source, status.st_mtime_ns))
    if unknown:
        begin(len(unknown))
    with concurrent.futures.ThreadPoolExecutor(readers) as pool:
        digests = pool.map(_digest_or_problem, [source.path for source, _ in unknown])
        for (source, time), digest in zip(unknown, digests, strict=True):
            if digest == records[source.name].sha256:
                same[source.name] = time
            elif digest.startswith("cannot"):
                changed[source.name].append(digest)
            else:
                changed[source.name].append("has another content of the same size")
            step(source.name)
    return SourceChanges(
        {name: f"{name} {' and '.join(found)}" for name, found in changed.items() if found},
        tuple(sorted(records.keys() - present)),
        same,
    )


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


def captions_of(dataset: Path, folder: Path, listing: Path | None) -> Callable[[str], str]:
    """The captions that the sources of a dataset have now, by their names.

    Args:
        dataset: with its manifest, which says the key of captions, and whether images are sources.
        folder: of the clips.
        listing: that has the captions; None if they are in files beside the clips.

    Raises:
        ValueError: the listing, or the manifest, cannot be read.
    """
    if not (dataset / MANIFEST_NAME).exists():  # of NVIDIA's script, which names no sources
        return lambda name: ""
    settings = read_manifest(dataset).settings
    key, images = str(settings.get("caption_key", "caption")), settings.get("mode") == "frames"
    finder = CaptionFinder(key)
    if listing is None:
        return lambda name: finder.find(folder / name)
    listed = {source.name: source for source in files_of_listing(listing, folder, images=images, caption_key=key)}

    def of_listing(name: str) -> str:
        source = listed.get(name)
        if source is None or source.problem is not None or source.path is None:
            raise ValueError(f"{listing} does not name it" if source is None else source.problem)
        return caption_of(source, finder)

    return of_listing
