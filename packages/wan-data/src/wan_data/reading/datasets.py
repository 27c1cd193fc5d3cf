"""Opening a dataset or a blend for reading: its files are validated before Energon reads them."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wan_data.reading.blends import Part, parts_of
from wan_data.reading.packing import latent_tokens
from wan_data.shards.energon_index import check_offsets
from wan_data.shards.energon_metadata import check_metadata, shard_counts
from wan_data.shards.manifest import MANIFEST_NAME, Manifest, read_manifest
from wan_model.config import PatchSize
from wan_model.latent_spec import LatentSpec
from wan_model.weights.model_folder import latent_spec_of as spec_of_model
from wan_model.weights.model_folder import resolve_folder


@dataclasses.dataclass(frozen=True)
class OpenPart:
    """A dataset of a split with validated metadata and complete shards.

    Attributes:
        part: the dataset and its split.
        shards: names and numbers of samples of the split's shards, in order.
        samples: number of samples of the split.
        manifest: None for shards of NVIDIA's own script.
        fingerprint: identifies the order of samples, because the state of a loader refers to samples by index.
    """

    part: Part
    shards: Sequence[tuple[str, int]]
    samples: int
    manifest: Manifest | None
    fingerprint: str


def splits(path: str | os.PathLike[str]) -> dict[str, int]:
    """Number of samples of each split of a dataset or blend; empty splits are omitted.

    Raises:
        ValueError: the path is no dataset, or its metadata could run code.
    """
    totals = {
        name: sum(count for part in parts for _, count in _shards(part)) for name, parts in parts_of(path).items()
    }
    return {name: total for name, total in totals.items() if total}


def read_latent_spec(path: str | os.PathLike[str], *, encoded_by: str | None = None) -> LatentSpec:
    """The latent space of a dataset, from its manifest; for a blend, that of all its datasets.

    Args:
        path: a dataset's folder, or the YAML file of a blend.
        encoded_by: the model (folder or hub id) that the shards were encoded with; needed for datasets without a
            manifest, which are those of NVIDIA's own script.

    Raises:
        ValueError: ``encoded_by`` is None for a dataset without a manifest, a dataset is incomplete, or the latent
            spaces of the datasets and of ``encoded_by`` differ.
    """
    folders = dict.fromkeys(part.folder for parts in parts_of(path).values() for part in parts)
    named = []
    for folder in folders:
        if (folder / MANIFEST_NAME).exists():
            named.append((f"the dataset in {folder}", read_manifest(folder).latent_spec))
        elif encoded_by is None:
            raise ValueError(
                f"{folder} has no {MANIFEST_NAME}, and so does not say which model it was encoded with; "
                "name that model with encoded_by=MODEL, or prepare the data with wan-data prepare"
            )
    if encoded_by is not None:
        model = resolve_folder(encoded_by, ["vae", "text_encoder"])
        # A model does not say to how many tokens captions were cut; without a manifest they have all that it takes.
        spec = spec_of_model(model, text_length=named[0][1].text_length) if named else spec_of_model(model)
        named.insert(0, (f"the model {encoded_by}", spec))
    return _common(named)


def open_split(path: str | os.PathLike[str], split: str) -> list[OpenPart]:
    """Open the datasets of a split.

    Raises:
        ValueError: there is no such split, or a dataset is damaged or unsafe.
    """
    parts = parts_of(path)
    available = splits(path)
    if split not in available:
        raise ValueError(f"{path} has no split {split!r}; it has {', '.join(available) or 'none'}")
    opened = []
    for part in parts[split]:
        shards = _shards(part)
        if not (samples := sum(count for _, count in shards)):
            raise ValueError(f"{path}, split {split}: {part.folder} has no sample in its split {part.split!r}")
        manifest = _manifest_of(part.folder)
        for name, count in shards:
            check_offsets(part.folder / name, count)
        opened.append(OpenPart(part, shards, samples, manifest, _fingerprint(part, manifest)))
    return opened


def common_latent_spec(parts: Sequence[OpenPart]) -> LatentSpec | None:
    """The latent space of the datasets; None if none of them has a manifest.

    Raises:
        ValueError: the datasets have different latent spaces.
    """
    specs = [
        (f"the dataset in {one.part.folder}", one.manifest.latent_spec) for one in parts if one.manifest is not None
    ]
    return _common(specs) if specs else None


def check_sizes(parts: Sequence[OpenPart], usable: int, patch_size: PatchSize) -> None:
    """Check that every sample of datasets with a manifest fits into a pack.

    Args:
        parts: the datasets of a split.
        usable: tokens of a pack without padding.
        patch_size: latent positions (frames, rows, columns) of a token.

    Raises:
        ValueError: a sample does not fit.
    """
    for one in parts:
        for shape in one.manifest.shapes if one.manifest else ():
            tokens = latent_tokens(shape.latent, patch_size)
            if shape.split == one.part.split and tokens > usable:
                raise ValueError(
                    f"{one.part.folder} has {shape.samples} samples of {shape.frames}x{shape.height}x{shape.width} "
                    f"with {tokens} tokens each, and a pack holds {usable}: raise the capacity, or prepare the data "
                    "with fewer frames or a smaller size"
                )


def _shards(part: Part) -> tuple[tuple[str, int], ...]:
    counts = shard_counts(part.folder)
    return tuple((shard, counts[shard]) for shard in check_metadata(part.folder)[part.split])


def _common(specs: Sequence[tuple[str, LatentSpec]]) -> LatentSpec:
    (first, spec), *others = specs
    for name, other in others:
        other.require_same(spec, name, first)
    return spec


def _manifest_of(folder: Path) -> Manifest | None:
    if not (folder / MANIFEST_NAME).exists():
        return None  # shards of NVIDIA's own script
    manifest = read_manifest(folder)
    for shard in manifest.shards:
        path = folder / shard.name
        size = path.stat().st_size if path.is_file() else None
        if size != shard.bytes:
            found = "is missing" if size is None else f"has {size} bytes"
            raise ValueError(f"{path} {found}; {MANIFEST_NAME} says {shard.bytes} bytes: the dataset is damaged")
    return manifest


def _fingerprint(part: Part, manifest: Manifest | None) -> str:
    hashes = {shard.name: shard.sha256 for shard in manifest.shards} if manifest else {}
    shards: dict[str, Any] = {
        name: [count, (part.folder / name).stat().st_size, hashes.get(name, "")]
        for name, count in shard_counts(part.folder).items()
    }
    text = json.dumps([shards, check_metadata(part.folder)[part.split], part.weight], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
