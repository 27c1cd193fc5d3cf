"""Blends of datasets: YAML files in the form of Energon's MetadatasetV2, read without instantiating their classes."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from wan_data.shards.energon_metadata import Metadata, read_metadata
from wan_model.system.safe_reading import read_yaml

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
        folder: folder of the dataset.
        split: split of that dataset.
        metadata: of the dataset, all splits.
        weight: relative frequency with which samples are drawn from it.
    """

    name: str
    folder: Path
    split: str
    metadata: Metadata = dataclasses.field(repr=False, compare=False)
    weight: float = 1.0

    @property
    def shards(self) -> tuple[tuple[str, int], ...]:
        """Names and numbers of samples of the split's shards, in order."""
        return tuple((name, self.metadata.counts[name]) for name in self.metadata.splits[self.split])


def parts_of(path: str | os.PathLike[str]) -> dict[str, tuple[Part, ...]]:
    """The datasets of each split of a dataset or blend.

    Args:
        path: a dataset's folder, or the YAML file of a blend, whose paths are relative to its folder.

    Raises:
        ValueError: the path is neither of the two, or the metadata of a dataset could run code.
    """
    path = Path(path)
    if path.is_dir():
        metadata = read_metadata(path)
        return {split: (Part("", path, split, metadata),) for split in metadata.splits}
    if path.is_file() and path.suffix.lower() in (".yaml", ".yml"):
        return _read(path)
    raise ValueError(
        f"{path} is no folder and no .yaml file; expected a dataset that wan-data prepare wrote, or a blend of several"
    )


def _read(path: Path) -> dict[str, tuple[Part, ...]]:
    value = read_yaml(path)
    if not isinstance(value, dict) or {**_HEAD, **value} != {**value, **_HEAD} or set(value) - {*_HEAD, "splits"}:
        raise ValueError(f"{path} is no blend of datasets; {_EXPECTED}")
    splits = value.get("splits")
    if not isinstance(splits, dict) or not splits:
        raise ValueError(f"{path} has no splits; {_EXPECTED}")
    metadata_of = functools.cache(read_metadata)  # of a dataset that is in several splits
    return {str(name): _parts(path, str(name), part, metadata_of) for name, part in splits.items()}


_MetadataOf = Callable[[Path], Metadata]


def _parts(path: Path, split: str, value: Any, metadata_of: _MetadataOf) -> tuple[Part, ...]:
    blended = isinstance(value, dict) and set(value) == {"blend"}
    items = value["blend"] if blended else [value]
    if not isinstance(items, list) or not items:
        raise ValueError(f"{path}, split {split}: it names no dataset; {_EXPECTED}")
    parts = tuple(_part(path, split, item, metadata_of, weighted=blended) for item in items)
    datasets = [(part.folder.resolve(), part.split) for part in parts]
    for number, dataset in enumerate(datasets):
        if dataset in datasets[:number]:
            raise ValueError(f"{path}, split {split}: {parts[number].name} is listed twice; add up the weights")
    return parts


def _part(path: Path, split: str, value: Any, metadata_of: _MetadataOf, *, weighted: bool) -> Part:
    known = {"path", "split_part", *(("weight",) if weighted else ())}
    if not isinstance(value, Mapping) or not isinstance(value.get("path"), str):
        raise ValueError(f"{path}, split {split}: {value!r} names no path; {_EXPECTED}")
    name = value["path"]
    if unknown := sorted(map(str, set(value) - known)):
        raise ValueError(f"{path}, split {split}, {name}: {', '.join(unknown)} cannot be used here; {_EXPECTED}")
    weight, own = value.get("weight", 1.0), value.get("split_part", split)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise ValueError(f"{path}, split {split}, {name}: its weight is {weight!r}; it must be a positive number")
    folder = path.parent / name
    if not folder.is_dir():
        raise ValueError(
            f"{path}, split {split}: {folder} is no folder; expected a dataset that wan-data prepare wrote"
        )
    metadata = metadata_of(folder)
    if own not in (there := metadata.splits):
        raise ValueError(f"{path}, split {split}: {folder} has no split {own!r}; it has {', '.join(there) or 'none'}")
    return Part(name, folder, own, metadata, float(weight))
