"""Reading of training checkpoints, without the engine that wrote them and without executing anything in them.

A training run writes ``FOLDER/iter_0000010/`` with ``.metadata``, ``*.distcp`` and ``run_config.yaml`` in it: a
``torch.distributed.checkpoint`` directory whose model tensors have diffusers' keys and global shapes. ``.metadata`` is
a pickle, so it is read by an unpickler that allows only the classes that such a file needs; the tensors are read with
``weights_only``; ``run_config.yaml`` is read as plain YAML.
"""

import enum
import io
import math
import pathlib
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.serialization import _get_layout

from wan_model.config import WanConfig
from wan_model.dit.lora import is_adapter_key
from wan_model.dit.model import precision_of
from wan_model.latent_spec import LatentSpec
from wan_model.system.safe_reading import read_bytes, require_file
from wan_model.weights.run_settings import RUN_CONFIG, read_run_settings
from wan_model.weights.transformer import check_keys, expected_shapes

METADATA = ".metadata"
# Bytes; a run of 14B parameters on a thousand ranks has some ten million.
_LARGEST_METADATA = 1 << 30
_STEP = re.compile(r"iter_(\d{7,})")

# Megatron's fully sharded checkpoints name modules as they are wrapped; the others have diffusers' keys.
_FSDP_PREFIX = "model.module.dit."
_EMA_PREFIX = "ema."
# The fp32 weights of Megatron's optimizer, where it shards them by parameter.
_MASTER_PREFIX = "optimizer.state.param."

_DCP = "torch.distributed.checkpoint"


def _enum_member(owner: Any, name: Any) -> enum.Enum:
    # Python 3.11 before 3.11.4 pickles an enum's member as getattr(enum, name).
    if isinstance(owner, type) and issubclass(owner, enum.Enum) and name in owner.__members__:
        return owner[name]
    raise pickle.UnpicklingError(f"it asks for the attribute {name!r} of {owner!r}, which no checkpoint needs")


_ALLOWED: dict[tuple[str, str], Any] = {
    **{
        (f"{_DCP}.metadata", name): getattr(metadata, name)
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
            "BytesStorageMetadata",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    },
    # Megatron-Core keeps the writers' plans in the index.
    **{
        (f"{_DCP}.planner", name): getattr(planner, name)
        for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
    },
    (f"{_DCP}.filesystem", "_StorageInfo"): filesystem._StorageInfo,
    ("builtins", "getattr"): _enum_member,
    ("torch.serialization", "_get_layout"): _get_layout,
    ("torch", "Size"): torch.Size,
    ("collections", "OrderedDict"): OrderedDict,
    # The writer's path, recorded for information only: a pure path touches no disk.
    ("pathlib", "PosixPath"): pathlib.PurePosixPath,
    ("pathlib._local", "PosixPath"): pathlib.PurePosixPath,
    # Megatron-Core 0.15 wrote subclasses with one more field, which concerns the optimizer alone.
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): Metadata,
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"): planner.SavePlan,
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


def read_index(path: Path) -> Metadata:
    """The index of a distributed checkpoint, read by an unpickler that allows only the classes of an index.

    Raises:
        ValueError: it is missing or damaged, or refers to another class.
    """
    file = path / METADATA
    try:
        content = read_bytes(file, _LARGEST_METADATA)
    except FileNotFoundError:
        raise ValueError(f"{file} is missing: the checkpoint was never completed") from None
    try:
        found = _MetadataUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # a damaged pickle can raise any exception
        raise ValueError(f"{file} is refused: {error or type(error).__name__}") from error
    if not _is_index(found):
        raise ValueError(f"{file} is not the index of a distributed checkpoint")
    return found


def _is_index(found: Any) -> bool:
    """Whether all that is read of an index has its type: an object of a pickle can have any attributes."""
    entries, places = (getattr(found, name, None) for name in ("state_dict_metadata", "storage_data"))
    return (
        isinstance(found, Metadata)
        and isinstance(entries, dict)
        and isinstance(places, dict)
        and all(isinstance(key, str) for key in entries)
        and all(_is_tensor_entry(entry) for entry in entries.values() if isinstance(entry, TensorStorageMetadata))
        and all(
            isinstance(index, MetadataIndex)
            and isinstance(info, filesystem._StorageInfo)
            and isinstance(getattr(info, "relative_path", None), str)
            and all(_is_count(getattr(info, name, None)) for name in ("offset", "length"))
            for index, info in places.items()
        )
    )


def _is_tensor_entry(entry: TensorStorageMetadata) -> bool:
    chunks = getattr(entry, "chunks", None)
    return (
        isinstance(getattr(entry, "size", None), tuple)
        and isinstance(getattr(getattr(entry, "properties", None), "dtype", None), torch.dtype)
        and isinstance(chunks, list)
        and all(isinstance(getattr(one, name, None), tuple) for one in chunks for name in ("sizes", "offsets"))
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _check_files(path: Path, index: Metadata) -> None:
    # The end of each file according to the index; a shorter file is truncated.
    ends: dict[str, int] = {}
    for info in index.storage_data.values():
        ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    for name, end in sorted(ends.items()):
        if Path(name).name != name or not name:
            raise ValueError(f"{path / METADATA} names {name!r}, which is not a file beside it")
        try:
            size = require_file(path / name)
        except FileNotFoundError:
            raise ValueError(f"{path / name} is missing, which {METADATA} names: the checkpoint is partial") from None
        if size < end:
            raise ValueError(f"{path / name} has {size} bytes where {METADATA} names {end}: it was cut short")


def read_run_config(path: Path, settings: dict[str, Any] | None = None) -> tuple[WanConfig, LatentSpec | None]:
    """Read a checkpoint's configuration: the transformer's sizes, and the latent space of its training data.

    The latent space is None for mock data.

    Args:
        path: the checkpoint.
        settings: of ``read_run_settings``, if they have been read already.

    Raises:
        ValueError: the file is missing, is no plain YAML, or describes another model.
    """
    file = path / RUN_CONFIG
    model = (read_run_settings(path) if settings is None else settings).get("model")
    transformer = model.get("transformer") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(transformer, dict) or "latent_spec" not in model:
        raise ValueError(f"{file} lacks model.transformer or model.latent_spec: it was cut, or is of another program")
    try:
        spec = None if model["latent_spec"] is None else LatentSpec.from_dict(model["latent_spec"])
        return WanConfig.from_diffusers(transformer), spec
    except ValueError as error:
        raise ValueError(f"{file} does not describe a Wan 2.1 transformer: {error}") from error


def open_checkpoint(path: Path) -> tuple[Metadata, WanConfig, LatentSpec | None]:
    """The index and the configuration of a complete checkpoint.

    Raises:
        ValueError: it is not complete; the message names what is missing.
    """
    index = read_index(path)
    _check_files(path, index)
    # The trainer writes this file last, so its presence implies that all other files are complete.
    return index, *read_run_config(path)


def _step_folders(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        raise ValueError(f"no checkpoint folder at {folder}: expected one with iter_0000010 and the like in it")
    found = {
        int(match[1]): path for path in folder.iterdir() if (match := _STEP.fullmatch(path.name)) and path.is_dir()
    }
    return dict(sorted(found.items()))


def checkpoint_steps(folder: Path) -> dict[int, Path]:
    """The complete checkpoints of a training run, by step, ascending.

    A checkpoint is complete if its index is readable, every file that the index names exists with at least the expected
    size, and the run's configuration exists.

    Raises:
        ValueError: the folder does not exist.
    """
    complete = {}
    for step, path in _step_folders(Path(folder)).items():
        try:
            open_checkpoint(path)
        except ValueError:
            continue
        complete[step] = path
    return complete


def find_checkpoint(folder: Path, step: int | None = None) -> Path:
    """Find the checkpoint to read.

    Args:
        folder: of the training run, or of one checkpoint in it.
        step: the step; the newest complete one by default. A partial checkpoint is never returned.

    Raises:
        ValueError: there is none, or the requested one is partial; the message names what is missing.
    """
    folder = Path(folder)
    match = _STEP.fullmatch(folder.name)
    if folder.is_dir() and (match or (folder / METADATA).exists()):
        own = int(match[1]) if match else None
        if step is not None and step != own:
            raise ValueError(f"{folder} is one checkpoint, of step {own or 'unknown'}; step {step} was requested")
        open_checkpoint(folder)
        return folder
    folders = _step_folders(folder)
    if not folders:
        raise ValueError(f"{folder} holds no checkpoint: expected folders such as iter_0000010 in it")
    if step is not None:
        if step not in folders:
            raise ValueError(f"{folder} has no checkpoint of step {step}; it has {', '.join(map(str, folders))}")
        open_checkpoint(folders[step])
        return folders[step]
    newest_problem: ValueError | None = None
    for path in reversed(folders.values()):
        try:
            open_checkpoint(path)
        except ValueError as error:
            newest_problem = newest_problem or error
        else:
            return path
    raise ValueError(f"no checkpoint in {folder} is complete; of the newest, {newest_problem}")


class _Reader(filesystem.FileSystemReader):
    """torch's reader with an index that was read safely."""

    def __init__(self, path: Path, index: Metadata) -> None:
        super().__init__(path)
        self.index = index

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self.index.storage_meta = StorageMeta(load_id=self.load_id)
        return self.index


def prefix_of_model(index: Metadata, config: WanConfig, path: Path, *, ema: bool, masters: bool) -> str:
    """The prefix of diffusers' keys in this checkpoint."""
    if masters and all(_MASTER_PREFIX + key in index.state_dict_metadata for key in expected_shapes(config)):
        return _MASTER_PREFIX
    if ema:
        if not any(key.startswith(_EMA_PREFIX) for key in index.state_dict_metadata):
            raise ValueError(f"{path} holds no EMA of the weights; it was trained without one (ema.decay)")
        return _EMA_PREFIX
    return _FSDP_PREFIX if any(key.startswith(_FSDP_PREFIX) for key in index.state_dict_metadata) else ""


def entries_of_model(
    index: Metadata, config: WanConfig, path: Path, prefix: str, expected: Mapping[str, tuple[int, ...]]
) -> dict[str, TensorStorageMetadata]:
    """The entries of a model's tensors, by diffusers' keys, which are exactly the expected ones and complete.

    Raises:
        ValueError: they are not.
    """
    # The index also has entries of the optimizer and of Megatron. Every entry with the prefix of the model's keys
    # counts as the model's, so that unexpected tensors are detected.
    families = {key.split(".")[0] for key in expected_shapes(config)}
    entries = {
        key.removeprefix(prefix): entry
        for key, entry in index.state_dict_metadata.items()
        if key.startswith(prefix)
        and key.removeprefix(prefix).split(".")[0] in families
        and isinstance(entry, TensorStorageMetadata)
    }
    check_keys({key: tuple(entry.size) for key, entry in entries.items()}, expected, str(path))
    for key, entry in entries.items():
        stored = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
        if stored < math.prod(entry.size):
            raise ValueError(f"{path} holds only {stored} of the {math.prod(entry.size)} values of {key}")
        for chunk in entry.chunks:
            if MetadataIndex(prefix + key, chunk.offsets) not in index.storage_data:
                raise ValueError(f"{path / METADATA} does not say where a part of {key} is stored")
    return entries


def read_into(named: Mapping[str, Tensor], path: Path, index: Metadata) -> None:
    """Read tensors of a checkpoint, by their names in it, into existing ones.

    Raises:
        ValueError: its files are damaged.
    """
    try:
        with warnings.catch_warnings():
            # torch warns that it reads in a single process, which is intended here.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(dict(named), storage_reader=_Reader(path, index), no_dist=True)  # into these very tensors
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        reason = " ".join(str(cause).split())[:200] or type(cause).__name__
        raise ValueError(f"the tensors in {path} cannot be read; its files are damaged: {reason}") from error


def read_training_checkpoint(
    path: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    ema: bool = False,
    masters: bool = False,
    into: Mapping[str, Tensor] | None = None,
) -> tuple[WanConfig, LatentSpec | None, dict[str, Tensor]]:
    """Read the model of one checkpoint (see ``find_checkpoint``); needs no process group.

    Args:
        path: of the checkpoint itself, ``.../iter_0000010``.
        device: of the returned tensors.
        dtype: of most of them (see ``wan_model.dit.model.precision_of``), converted when they are read; None keeps the
            stored dtype.
        ema: read the EMA instead of the weights.
        masters: read the optimizer's fp32 weights if it has them, as it does where the model computes in bfloat16.
        into: existing tensors to read into, by diffusers' keys; of a ``DTensor`` its local shard.

    Returns:
        The transformer's sizes, the latent space of its training data (None for mock data), and its full tensors by
        diffusers' keys.

    Raises:
        ValueError: the checkpoint is partial or damaged, its index refers to code, its tensors are not the model's, or
            it has no EMA.
    """
    path = Path(path)
    index, config, spec = open_checkpoint(path)
    if any(is_adapter_key(key) for key in index.state_dict_metadata):
        raise ValueError(
            f"{path} holds a LoRA, not the weights of a model; merge it with its base (wan-train merge), or sample it "
            "with --model BASE"
        )
    assert not (ema and masters), "the EMA is fp32 itself"
    prefix = prefix_of_model(index, config, path, ema=ema, masters=masters)
    entries = entries_of_model(index, config, path, prefix, expected_shapes(config))
    state: dict[str, Tensor]
    if into is not None:
        assert into.keys() == entries.keys(), "the tensors are those of a model of the checkpoint's sizes"
        state = dict(into)
    else:
        state = {
            key: torch.empty(
                entry.size,
                device=device,
                dtype=entry.properties.dtype if dtype is None else precision_of(key, dtype),
            )
            for key, entry in entries.items()
        }
    read_into({prefix + key: value for key, value in state.items()}, path, index)
    return config, spec, state
