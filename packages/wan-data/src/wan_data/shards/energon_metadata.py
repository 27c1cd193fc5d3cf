"""Energon's metadata folder ``.nv-meta``: writing it, and reading it in Energon's place.

Energon instantiates any class that ``dataset.yaml`` names, imports the files it refers to, and opens shards at any
path. Therefore only metadata of exactly the form that is written here is accepted, and Energon gets plain paths.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from wan_data.energon.version import energon_version
from wan_data.shards.database import sqlite_as_os_errors
from wan_data.shards.energon_index import INDEX_NAME, OFFSETS_SUFFIX, check_index, extend_index, write_index
from wan_data.shards.writer import ShardRecord
from wan_data.storage.files import Listing, is_file, listing_of, read_json, read_small, read_yaml, sizes_of
from wan_data.storage.location import Location, StorePath
from wan_data.storage.store import look
from wan_model.system.files import write_bytes
from wan_model.system.safe_reading import SMALL_YAML, parse_yaml

META_FOLDER = ".nv-meta"
INFO_NAME = ".info.json"
EARLIER_INFO_NAME = ".info.yaml"  # Energon 6 knows this one only, and accepts nothing but the counts in it
# Byte for byte what `energon prepare --sample-type CrudeWebdataset` writes too.
DATASET_YAML = b"__module__: megatron.energon\n__class__: CrudeWebdataset\n"
# For `energon info`, `lint` and `preview --dataset-config captioning.yaml`: Energon 7.4.1's own tools fail on crude
# datasets. Our loader never reads it.
CAPTIONING_NAME = "captioning.yaml"
CAPTIONING_YAML = b"""__module__: megatron.energon
__class__: StandardWebdatasetFactory
sample_type:
  __module__: megatron.energon
  __class__: CaptioningSample
field_map:
  image: pth
  caption: json[caption]
"""
# Bytes: a million shards have some forty million.
_LARGEST_INFO = 64 << 20
_MOST_SAMPLES = 1 << 32  # of a shard
_REMEDY = "run wan-data prepare again with the same arguments, or energon prepare, to write it anew"
# The splits that Energon's tools expect, even if they are empty.
_SPLITS = ("train", "val", "test")
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*\.tar")
# Names in split.yaml may have the form shard-{000..007}.tar. Other characters could have another meaning to another
# YAML parser than the one used here.
_SPLIT_BYTES = re.compile(rb"[A-Za-z0-9_.,{}:\-\[\]'\" \n]*")


def write_metadata(
    folder: Path, shards: Sequence[ShardRecord], before: Sequence[ShardRecord] = (), *, elsewhere: bool = False
) -> None:
    """Write ``.nv-meta`` for finished shards: index, counts, splits and the type of the dataset.

    Args:
        folder: folder of the dataset.
        shards: all shards, each with its split; the train split must not be empty.
        before: the shards that the metadata is of already. If the others follow these, the index is added to.
        elsewhere: these need not be in the folder.
    """
    splits = dict.fromkeys((*_SPLITS, *(shard.split for shard in shards)))
    assert any(shard.split == "train" for shard in shards), "a dataset without training samples is refused before this"
    names = {split: [shard.name for shard in shards if shard.split == split] for split in splits}
    meta = folder / META_FOLDER
    meta.mkdir(exist_ok=True)
    with sqlite_as_os_errors(meta / INDEX_NAME):
        if not (before and extend_index(folder, meta, before, shards)):
            write_index(folder, meta, shards, before if elsewhere else ())
    # Energon draws this UUID at random; ours is the same in every run.
    digest = hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).digest()
    counts = {"shard_counts": {shard.name: shard.samples for shard in shards}}
    for name, content in (
        (INFO_NAME, json.dumps({"energon_version": energon_version(), **counts}, indent=2).encode()),
        (EARLIER_INFO_NAME, _info_yaml(shards).encode()),
        ("index.uuid", str(uuid.UUID(bytes=digest[:16])).encode()),
        ("split.yaml", _split_yaml(names).encode()),
        ("dataset.yaml", DATASET_YAML),
        (CAPTIONING_NAME, CAPTIONING_YAML),
    ):
        write_bytes(meta / name, content)


def _info_yaml(shards: Sequence[ShardRecord]) -> str:
    """As ``yaml.safe_dump`` writes it, in a hundredth of its time."""
    lines = (f"  {shard.name}: {shard.samples}\n" for shard in sorted(shards, key=lambda shard: shard.name))
    return "shard_counts:\n" + "".join(lines)


def _split_yaml(names: Mapping[str, Sequence[str]]) -> str:
    """Likewise."""
    lines = (
        f"  {split}:\n" + "".join(f"  - {name}\n" for name in of) if of else f"  {split}: []\n"
        for split, of in names.items()
    )
    return "split_parts:\n" + "".join(lines) + "exclude: []\n"


def restore_metadata(folder: Path, shards: Sequence[ShardRecord]) -> bool:
    """Write ``.nv-meta`` and the ``.idx`` files anew if they are damaged; see ``write_metadata`` for the arguments.

    Splits that were changed by hand in ``split.yaml`` are kept, unless something is damaged.

    Returns:
        Whether they were written.
    """
    counts = {shard.name: shard.samples for shard in shards}
    with contextlib.suppress(ValueError):
        if read_metadata(folder).counts == counts:
            check_index(folder, folder / META_FOLDER, list(counts.items()))
            return False
    # What has their names, but is no file, could not be replaced.
    for path in (folder / META_FOLDER, *(folder / (name + OFFSETS_SUFFIX) for name in counts)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    write_metadata(folder, shards)
    return True


def shard_counts(folder: Location) -> Mapping[str, int]:
    """Number of samples of each shard, from Energon's metadata; see below."""
    return _counts_and_sizes(folder)[0]


def _info_path(folder: Location) -> Location:
    meta = folder / META_FOLDER
    # What is there, but is no file, is not passed over.
    there = os.path.lexists(meta / INFO_NAME) if isinstance(meta, Path) else is_file(meta / INFO_NAME)
    return meta / (INFO_NAME if there else EARLIER_INFO_NAME)


def _counts_and_sizes(folder: Location) -> tuple[dict[str, int], dict[str, int], Listing | None]:
    """Number of samples of each shard, from Energon's metadata, its bytes, and the folder as it is in a store.

    Raises:
        ValueError: the file is missing, or names anything but shards of this folder.
    """
    path = _info_path(folder)
    try:
        info = read_yaml(path) if path.suffix == ".yaml" else read_json(path, _LARGEST_INFO)
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {META_FOLDER}/{INFO_NAME}: {_REMEDY}") from None
    except ValueError as error:
        raise ValueError(f"{error}; {_REMEDY}") from None
    counts = info.get("shard_counts") if isinstance(info, dict) else None
    if not isinstance(counts, dict):
        raise ValueError(f"{path} does not count the samples of shards; {_REMEDY}")
    for name, count in counts.items():
        if type(count) is not int or not 0 <= count <= _MOST_SAMPLES:
            raise ValueError(f"{path} says that {name!r:.100} has {count!r:.40} samples; {_REMEDY}")
    for name in counts:
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
            raise ValueError(f"{path} names {name!r}; expected the plain name of a .tar file beside {META_FOLDER}")
    listing: Listing | None = None
    if isinstance(folder, StorePath) and isinstance(path, StorePath):
        listing = listing_of(folder, counts, look(path))
        there = {name: size for name, (size, _) in listing.found.items()}
    elif isinstance(folder, Path):
        there = sizes_of(folder, counts)
    for name in counts:
        if name not in there:
            raise ValueError(f"{path} names {name}, which is missing from {folder}; restore it, or {_REMEDY}")
    sizes = {sys.intern(name): there[name] for name in counts}
    return {name: counts[name] for name in sizes}, sizes, listing


def _names_of(pattern: str, most: int, where: Location) -> Iterator[str]:
    """The names that a pattern such as ``shard-{000..131}.tar`` stands for, as Energon's reader expands it."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices: list[list[str]] = []
    for number, part in enumerate(parts):
        if not number % 2:
            found = [part]
        elif part.replace(",", "").isalnum() and "," in part:
            found = part.split(",")
        elif match := re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", part):
            (first, last), width = map(int, match.groups()), max(map(len, match.groups()))
            padded = any(text.startswith("0") and len(text) > 1 for text in match.groups())
            if not 0 <= last - first < most:
                raise ValueError(f"{where} names {pattern!r}, which is more than the {most} shards that are counted")
            found = [str(value).zfill(width if padded else 0) for value in range(first, last + 1)]
        else:
            raise ValueError(f"{where} names {pattern!r}; expected names of shards, or ranges such as {{000..131}}")
        choices.append(found)
        if math.prod(map(len, choices)) > most:
            raise ValueError(f"{where} names {pattern!r}, which is more than the {most} shards that are counted")
    return map("".join, itertools.product(*choices))


def _plain_split(text: str) -> dict[str, Any] | None:
    """The content of a ``split.yaml`` in the form that Energon and we write, in a hundredth of a YAML parser's time.

    None for any other form.
    """
    parts: dict[str, list[str]] = {}
    empty: set[str] = set()
    lines = text.split("\n")
    for line in lines:
        if match := re.fullmatch(r"  - ([A-Za-z][A-Za-z0-9_.{}-]*\.tar)", line):
            if not parts:
                return None
            parts[next(reversed(parts))].append(match[1])
        elif match := re.fullmatch(r"  ([A-Za-z]+):( \[\])?", line):
            if match[1] in parts or match[1].lower() in ("y", "n", "yes", "no", "on", "off", "true", "false", "null"):
                return None
            parts[match[1]] = []
            empty |= {match[1]} if match[2] else set()
        elif line not in ("split_parts:", "exclude: []", ""):
            return None
    if sorted(line for line in lines if line and line[0] != " ") != ["exclude: []", "split_parts:"]:
        return None
    if not parts or {name for name, names in parts.items() if not names} != empty:
        return None
    return {"split_parts": parts, "exclude": []}


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What ``.nv-meta`` says.

    Attributes:
        counts: number of samples of each shard.
        sizes: bytes of each shard.
        splits: the shards of each split.
        listing: the shards and their indices as they are in a store; None on a disk.
    """

    counts: Mapping[str, int]
    sizes: Mapping[str, int]
    splits: Mapping[str, Sequence[str]]
    listing: Listing | None = None


def check_metadata(folder: Location) -> Mapping[str, Sequence[str]]:
    """The shards of each split; see ``read_metadata``."""
    return read_metadata(folder).splits


def read_metadata(folder: Location) -> Metadata:
    """Read ``.nv-meta``, after a check that Energon can read it without running code from it.

    Of a store, that takes a request for each file of metadata and for each five hundred shards.

    Raises:
        ValueError: a file is missing, or differs from those of ``write_metadata`` in more than names and counts.
    """
    meta = folder / META_FOLDER
    dataset_yaml = meta / "dataset.yaml"
    there = is_file(dataset_yaml)
    # In a store a folder is there with its first object.
    if not (meta.is_dir() if isinstance(meta, Path) else there):
        raise ValueError(f"{folder} has no {META_FOLDER} folder: expected a dataset that wan-data prepare wrote")
    if not there:
        raise ValueError(f"{dataset_yaml} is missing: {_REMEDY}")
    if read_small(dataset_yaml) != DATASET_YAML:
        raise ValueError(
            f"{dataset_yaml} is not what wan-data writes and could run code when it is loaded; "
            f"expected exactly {DATASET_YAML.decode()!r}; {_REMEDY}"
        )
    counts, sizes, listing = _counts_and_sizes(folder)
    split_yaml = meta / "split.yaml"
    data = read_small(split_yaml, _LARGEST_INFO) if is_file(split_yaml) else b""
    # Two underscores would name a class or module to Energon's reader.
    if not data or not _SPLIT_BYTES.fullmatch(data) or b"__" in data:
        raise ValueError(f"{split_yaml} is missing or holds more than names of shards; {_REMEDY}")
    value = _plain_split(data.decode())
    if value is None:
        if len(data) > SMALL_YAML:
            raise ValueError(f"{split_yaml} is not of the form that Energon writes; {_REMEDY}")
        try:
            value = parse_yaml(data.decode(), str(split_yaml))
        except ValueError as error:
            raise ValueError(f"{error}; {_REMEDY}") from None
    parts = value.get("split_parts") if isinstance(value, dict) else None
    if not isinstance(parts, dict) or set(value) - {"split_parts", "exclude"} or value.get("exclude"):
        raise ValueError(f"{split_yaml} must hold split_parts and an empty exclude, nothing else; {_REMEDY}")
    splits: dict[str, list[str]] = {}
    seen: set[str] = set()
    for split, patterns in parts.items():
        if not isinstance(split, str) or not isinstance(patterns, list):
            raise ValueError(f"{split_yaml} must list the shards of each split; {_REMEDY}")
        names: list[str] = []
        for pattern in patterns:
            for name in _names_of(str(pattern), len(counts), split_yaml):
                if name not in counts:
                    raise ValueError(f"{split_yaml} names {name!r:.100}, which .info.json does not count; {_REMEDY}")
                if name in seen:
                    raise ValueError(f"{split_yaml} names {name!r:.100} twice; {_REMEDY}")
                seen.add(name)
                names.append(sys.intern(name))
        splits[split] = names
    return Metadata(counts, sizes, splits, listing)
