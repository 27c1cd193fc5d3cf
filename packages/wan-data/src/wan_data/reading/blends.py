"""Blends of datasets: YAML files in the form of Energon's MetadatasetV2, read without instantiating their classes."""

import dataclasses
import functools
import math
import os
import posixpath
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from wan_data.shards.energon_metadata import Metadata, read_metadata
from wan_data.storage.files import is_file, read_yaml
from wan_data.storage.location import Location, StorePath, location

_HEAD = {"__module__": "megatron.energon", "__class__": "MetadatasetV2"}
_EXPECTED = (
    "expected Energon's MetadatasetV2 with splits -> a name -> either path, or blend: a list of path and weight, "
    "each with split_part if the names of the splits differ"
)


@dataclasses.dataclass(frozen=True)
class Part:
    """One dataset of a split.

    Attributes:
        name: its path as the blend spells it; empty if a dataset is read without a blend.
        folder: folder of the dataset, on a disk or in a store.
        split: split of that dataset.
        metadata: of the dataset, all splits.
        weight: relative frequency with which samples are drawn from it.
    """

    name: str
    folder: Location
    split: str
    metadata: Metadata = dataclasses.field(repr=False, compare=False)
    weight: float = 1.0

    @property
    def shards(self) -> tuple[tuple[str, int], ...]:
        """Names and numbers of samples of the split's shards, in order."""
        return tuple((name, self.metadata.counts[name]) for name in self.metadata.splits[self.split])


def parts_of(path: str | os.PathLike[str] | StorePath) -> dict[str, tuple[Part, ...]]:
    """The datasets of each split of a dataset or blend.

    Args:
        path: a dataset's folder, or the YAML file of a blend, whose paths are relative to its folder. All may be URLs.

    Raises:
        ValueError: the path is neither of the two, or the metadata of a dataset could run code.
    """
    found = location(path)
    is_yaml = found.suffix.lower() in (".yaml", ".yml")
    # A store has no folders, only objects whose names begin alike.
    if found.is_dir() if isinstance(found, Path) else not is_yaml:
        metadata = read_metadata(found)
        return {split: (Part("", found, split, metadata),) for split in metadata.splits}
    if is_yaml and is_file(found):
        return _read(found)
    what = "is no folder and no .yaml file" if isinstance(found, Path) else "does not exist"
    raise ValueError(f"{path} {what}; expected a dataset that wan-data prepare wrote, or a blend of several")


def _read(path: Location) -> dict[str, tuple[Part, ...]]:
    value = read_yaml(path)
    if not isinstance(value, dict) or {**_HEAD, **value} != {**value, **_HEAD} or set(value) - {*_HEAD, "splits"}:
        raise ValueError(f"{path} is no blend of datasets; {_EXPECTED}")
    splits = value.get("splits")
    if not isinstance(splits, dict) or not splits:
        raise ValueError(f"{path} has no splits; {_EXPECTED}")
    metadata_of = functools.cache(read_metadata)  # of a dataset that is in several splits
    return {str(name): _parts(path, str(name), part, metadata_of) for name, part in splits.items()}


_MetadataOf = Callable[[Location], Metadata]


def _parts(path: Location, split: str, value: Any, metadata_of: _MetadataOf) -> tuple[Part, ...]:
    blended = isinstance(value, dict) and set(value) == {"blend"}
    items = value["blend"] if blended else [value]
    if not isinstance(items, list) or not items:
        raise ValueError(f"{path}, split {split}: it names no dataset; {_EXPECTED}")
    parts = tuple(_part(path, split, item, metadata_of, weighted=blended) for item in items)
    datasets = [(_resolved(part.folder), part.split) for part in parts]
    for number, dataset in enumerate(datasets):
        if dataset in datasets[:number]:
            raise ValueError(f"{path}, split {split}: {parts[number].name} is listed twice; add up the weights")
    return parts


def _part(path: Location, split: str, value: Any, metadata_of: _MetadataOf, *, weighted: bool) -> Part:
    known = {"path", "split_part", *(("weight",) if weighted else ())}
    if not isinstance(value, Mapping) or not isinstance(value.get("path"), str):
        raise ValueError(f"{path}, split {split}: {value!r} names no path; {_EXPECTED}")
    name = value["path"]
    if unknown := sorted(map(str, set(value) - known)):
        raise ValueError(f"{path}, split {split}, {name}: {', '.join(unknown)} cannot be used here; {_EXPECTED}")
    weight, own = value.get("weight", 1.0), value.get("split_part", split)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise ValueError(f"{path}, split {split}, {name}: its weight is {weight!r}; it must be a positive number")
    folder = _beside(path, name)
    if isinstance(folder, Path) and not folder.is_dir():
        raise ValueError(
            f"{path}, split {split}: {folder} is no folder; expected a dataset that wan-data prepare wrote"
        )
    metadata = metadata_of(folder)
    if own not in (there := metadata.splits):
        raise ValueError(f"{path}, split {split}: {folder} has no split {own!r}; it has {', '.join(there) or 'none'}")
    return Part(name, folder, own, metadata, float(weight))


def _beside(path: Location, name: str) -> Location:
    """What a name in a blend means: it is relative to the blend's folder unless it is a URL, or begins with a slash."""
    found = location(name)
    if isinstance(path, Path) or isinstance(found, StorePath) or found.is_absolute():
        return path.parent / found if isinstance(path, Path) and isinstance(found, Path) else found
    key = posixpath.normpath(posixpath.join(path.parent.key, name))
    return StorePath(path.scheme, path.bucket, "") if key == "." else StorePath(path.scheme, path.bucket, "") / key


def _resolved(folder: Location) -> Location:
    return folder.resolve() if isinstance(folder, Path) else folder
