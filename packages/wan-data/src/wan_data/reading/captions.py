"""Captions of a split's samples, from the json members in its shards."""

import os
from collections.abc import Iterator

from wan_data.reading.datasets import open_split
from wan_data.shards.indexed_reader import IndexedShards
from wan_data.shards.serialization import info_from_json
from wan_data.storage.location import StorePath


def captions_of(path: str | os.PathLike[str] | StorePath, split: str) -> Iterator[tuple[str, str]]:
    """Name and caption of each sample, in the order in which ``PackLoader`` reads a split that is no training split.

    Args:
        path: a dataset's folder, or the YAML file of a blend.
        split: the split.

    Yields:
        The name as the keys of packs have it, and the caption, empty where the json member has none.

    Raises:
        ValueError: there is no such split, or a sample is damaged.
    """
    for one in open_split(path, split):
        shards = IndexedShards(one.part.folder, one.shards, listing=one.part.metadata.listing)
        for number in range(one.samples):
            key, shard, info = shards.read_info(number)
            try:
                caption = info_from_json(info).get("caption", "")
            except ValueError as error:
                raise ValueError(f"shard {shard}, sample {key}: {error}") from None
            yield f"{one.part.name}:{key}" if one.part.name else key, str(caption)
