"""``wan-data upgrade``: from the format in which one file listed all sources to the index of today."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

from wan_data.index.lengths import LengthCounts, SplitLengths, with_lengths
from wan_data.index.manifest import FORMAT_VERSION, Manifest, open_sources
from wan_data.index.sources import IndexState, added
from wan_data.shards.reader import infos_of, text_lengths
from wan_data.sources.modification_times import EARLIER_TIMES_NAME, source_times
from wan_model.system.safe_reading import read_json

_LARGEST_TIMES = 4 << 30


def upgrade(folder: Path, manifest: Manifest, step: Callable[[str], None] = lambda name: None) -> Manifest:
    """Turn a dataset of an earlier format into today's; its shards stay as they are.

    The index is written first and the manifest last, so an interrupted upgrade leaves the dataset as it was.

    Args:
        folder: of the dataset, which no other process writes.
        manifest: of it.
        step: called with the name of each shard whose side information has been read.

    Returns:
        The manifest as written.

    Raises:
        ValueError: the manifest is damaged.
    """
    if manifest.format_version == FORMAT_VERSION:
        return manifest
    with open_sources(folder, manifest) as index:
        state = added(folder, IndexState(), index.records())
    new = dataclasses.replace(
        manifest, index=state, lengths=_lengths(folder, manifest, step), format_version=FORMAT_VERSION
    )
    _keep_times(folder)
    new.write(folder)
    (folder / EARLIER_TIMES_NAME).unlink(missing_ok=True)
    return new


def _lengths(folder: Path, manifest: Manifest, step: Callable[[str], None]) -> tuple[SplitLengths, ...] | None:
    found: list[tuple[str, LengthCounts | None, int]] = []
    for shard in manifest.shards:
        # A damaged shard is for wan-data verify to name; without its lengths, inspect reads the samples.
        try:
            lengths = [text_lengths(info) for info in infos_of(folder / shard.name)]
        except (ValueError, OSError):
            return None
        found.append((shard.split, LengthCounts.of_samples(lengths), 1))
        step(shard.name)
    return with_lengths((), found)


def _keep_times(folder: Path) -> None:
    # Without them all contents are compared.
    with contextlib.suppress(OSError, ValueError):
        times = read_json(folder / EARLIER_TIMES_NAME, _LARGEST_TIMES)
        if isinstance(times, dict):
            with source_times(folder) as known:
                known.put({name: time for name, time in times.items() if type(time) is int})
