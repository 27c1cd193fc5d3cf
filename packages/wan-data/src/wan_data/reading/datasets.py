"""Opening a dataset or a blend for reading: its files are validated before Energon reads them."""

import dataclasses
import os
from collections.abc import Mapping, Sequence

from wan_data.index.manifest import MANIFEST_NAME, Manifest, read_manifest
from wan_data.reading.blends import Part, parts_of
from wan_data.reading.fingerprint import fingerprint_of
from wan_data.reading.packing import latent_tokens
from wan_data.shards.energon_index import check_all_offsets
from wan_data.storage.files import file_size, is_there
from wan_data.storage.location import Location, StorePath
from wan_model.config import OFFICIAL_TEXT_LENGTH, PatchSize
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


def splits(path: str | os.PathLike[str] | StorePath) -> dict[str, int]:
    """Number of samples of each split of a dataset or blend; empty splits are omitted.

    Raises:
        ValueError: the path is no dataset, or its metadata could run code.
    """
    return _splits(parts_of(path))


def _splits(found: Mapping[str, Sequence[Part]]) -> dict[str, int]:
    totals = {name: sum(count for part in parts for _, count in part.shards) for name, parts in found.items()}
    return {name: total for name, total in totals.items() if total}


def read_latent_spec(path: str | os.PathLike[str] | StorePath, *, encoded_by: str | None = None) -> LatentSpec:
    """The latent space of a dataset, from its manifest, with the rate of its videos; for a blend, that of all datasets.

    Args:
        path: a dataset's folder, or the YAML file of a blend.
        encoded_by: the model (folder or hub id) that the shards were encoded with; needed for datasets without a
            manifest, which are those of NVIDIA's own script, with texts of 512 tokens.

    Raises:
        ValueError: ``encoded_by`` is None for a dataset without a manifest, a dataset is incomplete, or the latent
            spaces of the datasets and of ``encoded_by`` differ.
    """
    folders = dict.fromkeys(part.folder for parts in parts_of(path).values() for part in parts)
    bare = [folder for folder in folders if not is_there(folder / MANIFEST_NAME)]
    if bare and encoded_by is None:
        raise ValueError(
            f"{bare[0]} has no {MANIFEST_NAME}, and so does not say which model it was encoded with; "
            "name that model with encoded_by=MODEL, or prepare the data with wan-data prepare"
        )
    named = [
        (f"the dataset in {folder}", _spec_of_manifest(folder, read_manifest(folder)))
        for folder in folders
        if folder not in bare
    ]
    if encoded_by is not None:
        # A model does not say what captions were cut to, so it agrees with any length that all datasets record.
        length = OFFICIAL_TEXT_LENGTH if bare else named[0][1].text_length
        model = resolve_folder(encoded_by, ["vae", "text_encoder"])
        named.insert(0, (f"the model {encoded_by}", spec_of_model(model, text_length=length)))
    return _common(named)


def _spec_of_manifest(folder: Location, manifest: Manifest) -> LatentSpec:
    """The latent space that a manifest records, with the rate of its videos; images have none."""
    if manifest.settings.get("mode") != "video":
        return manifest.latent_spec
    fps = manifest.settings.get("fps")
    try:
        if fps is not None and not isinstance(fps, str):
            raise ValueError(f"fps is {fps!r}; expected a text such as '16' or '24000/1001'")
        return dataclasses.replace(manifest.latent_spec, fps=fps)
    except ValueError as error:
        raise ValueError(f"the settings in {folder / MANIFEST_NAME} are damaged: {error}") from None


def open_split(path: str | os.PathLike[str] | StorePath, split: str) -> list[OpenPart]:
    """Open the datasets of a split.

    Raises:
        ValueError: there is no such split, or a dataset is damaged or unsafe.
    """
    parts = parts_of(path)
    available = _splits(parts)
    if split not in available:
        raise ValueError(f"{path} has no split {split!r}; it has {', '.join(available) or 'none'}")
    opened = []
    for part in parts[split]:
        shards = part.shards
        if not (samples := sum(count for _, count in shards)):
            raise ValueError(f"{path}, split {split}: {part.folder} has no sample in its split {part.split!r}")
        manifest = _manifest_of(part.folder)
        if manifest is not None:
            _check_sizes(part.folder, manifest, part.metadata.sizes)
        check_all_offsets(part.folder, shards, part.metadata.listing)
        opened.append(OpenPart(part, shards, samples, manifest, fingerprint_of(part, manifest)))
    return opened


def common_latent_spec(parts: Sequence[OpenPart]) -> LatentSpec | None:
    """The latent space of the datasets; None if none of them has a manifest.

    Raises:
        ValueError: the datasets have different latent spaces.
    """
    specs = [
        (f"the dataset in {one.part.folder}", _spec_of_manifest(one.part.folder, one.manifest))
        for one in parts
        if one.manifest is not None
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


def _common(specs: Sequence[tuple[str, LatentSpec]]) -> LatentSpec:
    spec = specs[0][1]
    for number, (name, other) in enumerate(specs):
        for first, earlier in specs[:number]:  # with each, because what one does not know another may
            other.require_same(earlier, name, first)
        spec = spec.completed(other)
    return spec


def _manifest_of(folder: Location) -> Manifest | None:
    if not is_there(folder / MANIFEST_NAME):
        return None  # shards of NVIDIA's own script
    return read_manifest(folder)


def _check_sizes(folder: Location, manifest: Manifest, sizes: Mapping[str, int]) -> None:
    """Refuse shards that are not as the manifest has them, for each that it lists."""
    for shard in manifest.shards:
        size = sizes.get(shard.name)
        if size is None:
            size = file_size(folder / shard.name)
        if size != shard.bytes:
            found = "is missing" if size is None else f"has {size} bytes"
            raise ValueError(
                f"{folder / shard.name} {found}; {MANIFEST_NAME} says {shard.bytes} bytes: the dataset is damaged"
            )
