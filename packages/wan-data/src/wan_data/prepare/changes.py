"""What has changed of sources that are in a dataset already: their sizes and captions."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from wan_data.prepare.captions import CaptionFinder
from wan_data.prepare.settings import PrepareSettings
from wan_data.prepare.sources import SourceFile, caption_of, files_of_listing
from wan_data.shards.manifest import MANIFEST_NAME, Manifest, read_manifest


def caption_digest(caption: str) -> str:
    """SHA-256 of a caption, as the manifest holds it."""
    return hashlib.sha256(caption.encode()).hexdigest()


def changed_sources(sources: Sequence[SourceFile], manifest: Manifest) -> list[str]:
    """Name the accepted sources of a dataset that have changed since they were encoded, one sentence each.

    Sizes and captions are compared, which reads no clip; ``wan-data verify --sources`` compares the contents too.

    Args:
        sources: as ``prepare`` gets them.
        manifest: of the dataset.
    """
    records = {record.path: record for record in manifest.sources if record.verdict == "accepted"}
    captions = CaptionFinder(str(manifest.settings.get("caption_key", "caption")))
    changed = []
    for source in sources:
        record = records.get(source.name)
        if record is None or source.path is None or not source.path.is_file():
            continue
        if (size := source.path.stat().st_size) != record.bytes:
            changed.append(f"{source.name} has {size} bytes instead of {record.bytes}")
        if record.caption_sha256 is None:  # of a version that did not record it
            continue
        try:
            if caption_digest(caption_of(source, captions)) != record.caption_sha256:
                changed.append(f"{source.name} has another caption")
        except ValueError as error:
            changed.append(f"{source.name} has lost its caption: {error}")
    return changed


def captions_of(dataset: Path, folder: Path, listing: Path | None) -> Callable[[str], str]:
    """The captions that the sources of a dataset have now, by their names.

    Args:
        dataset: with its manifest, which says the key of captions.
        folder: of the clips.
        listing: that has the captions; None if they are in files beside the clips.

    Raises:
        ValueError: the listing, or the manifest, cannot be read.
    """
    if not (dataset / MANIFEST_NAME).exists():  # of NVIDIA's script, which names no sources
        return lambda name: ""
    key = str(read_manifest(dataset).settings.get("caption_key", "caption"))
    finder = CaptionFinder(key)
    if listing is None:
        return lambda name: finder.find(folder / name)
    listed = {source.name: source for source in files_of_listing(listing, folder, PrepareSettings(caption_key=key))}

    def of_listing(name: str) -> str:
        source = listed.get(name)
        if source is None or source.problem is not None or source.path is None:
            raise ValueError(f"{listing} does not name it" if source is None else source.problem)
        return caption_of(source, finder)

    return of_listing
