"""Packs of latents for training: Energon's loader with exact resume, in plain values.

Nothing here needs torch.distributed, a GPU or Megatron-Core: the caller says which data-parallel rank it is.
"""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.energon import WorkerConfig, get_savable_loader, get_train_dataset, get_val_dataset
from megatron.energon import __version__ as energon_version
from megatron.energon.errors import reraise_exception

from wan_data.energon_metadata import check_metadata, shard_counts
from wan_data.loader_state import from_plain, to_plain
from wan_data.manifest import MANIFEST_NAME, Manifest, read_manifest
from wan_data.packing import usable_capacity
from wan_data.task_encoder import PackEncoder, settings_of
from wan_model.latent_spec import LatentSpec
from wan_model.pack import LatentPack

STATE_VERSION = 1
# Samples are drawn from at most this many runs of neighbours, which bounds the state: a state lists them.
_MOST_SEQUENCES = 20_000
_PREFETCH = 2


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
    """What to load and how to pack it.

    Attributes:
        path: the dataset's folder.
        capacity: tokens of a pack, padding included.
        split: ``train`` is read without end in random order; any other split once, in order.
        text_length: tokens that texts are zero-padded to.
        patch_size: latent positions (frames, rows, columns) of a token.
        pad_multiple: packs are padded to a multiple of this many tokens (tensor and context parallelism).
        packing_buffer: samples looked at together when packing; at most a worker's share of the split is. Those of the
            emptiest packs are looked at again with the next ones, so a sample comes at most one buffer late.
        shuffle_buffer: samples mixed among each other, where a worker's share is too large to be permuted one by one.
            Epochs then run into each other a little; without it every sample comes exactly once an epoch.
        num_workers: processes that read; 0 reads here.
        seed: of the order.
    """

    path: str
    capacity: int
    split: str = "train"
    text_length: int = 512
    patch_size: tuple[int, int, int] = (1, 2, 2)
    pad_multiple: int = 1
    packing_buffer: int = 64
    shuffle_buffer: int = 0
    num_workers: int = 0
    seed: int = 1234


def splits(path: str | os.PathLike[str]) -> dict[str, int]:
    """Samples of each split of a dataset; empty splits are left out.

    Raises:
        ValueError: it is no dataset, or its metadata could run code.
    """
    counts = shard_counts(Path(path))
    totals = {name: sum(counts[shard] for shard in shards) for name, shards in check_metadata(Path(path)).items()}
    return {name: total for name, total in totals.items() if total}


def read_latent_spec(path: str | os.PathLike[str]) -> LatentSpec:
    """The latent space of a dataset, from its own metadata.

    Raises:
        ValueError: it has none (it was not written by wan-data), or is incomplete.
    """
    return read_manifest(Path(path)).latent_spec


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


def _fingerprint(folder: Path, manifest: Manifest | None, parts: Mapping[str, list[str]]) -> str:
    # Which samples lie at which index: the restored state speaks of indices.
    hashes = {shard.name: shard.sha256 for shard in manifest.shards} if manifest else {}
    shards = {
        name: [count, (folder / name).stat().st_size, hashes.get(name, "")]
        for name, count in shard_counts(folder).items()
    }
    return hashlib.sha256(json.dumps([shards, parts], sort_keys=True).encode()).hexdigest()[:16]


class PackLoader:
    """Packs of one data-parallel rank.

    Ranks of one tensor-, pipeline- or context-parallel group pass the same ``rank`` and see identical packs; different
    ranks see different samples of each epoch. The order depends on the seed, the rank, the world size and the number
    of workers alone.

    Args:
        config: what to load.
        rank, world_size: of data parallelism.

    Raises:
        ValueError: a dataset that is missing, damaged, unsafe, or too small for this many ranks and workers, or samples
            that no pack can hold.
    """

    def __init__(self, config: LoaderConfig, *, rank: int, world_size: int) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} does not exist; ranks count from 0")
        for name in ("packing_buffer", "text_length"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name} is {getattr(config, name)}; it must be at least 1")
        if config.num_workers < 0:
            raise ValueError(f"num_workers is {config.num_workers}; it must be at least 0")
        self.config, self.rank, self.world_size = config, rank, world_size
        folder = Path(config.path)
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder; expected a dataset that wan-data prepare wrote")
        parts = check_metadata(folder)
        available = splits(folder)
        if config.split not in available:
            raise ValueError(f"{folder} has no split {config.split!r}; it has {', '.join(available) or 'none'}")
        manifest = _manifest_of(folder)
        self.dataset_fingerprint = _fingerprint(folder, manifest, parts)
        self._check_capacity(manifest)
        self._share = available[config.split] // (world_size * max(1, config.num_workers))
        self._encoder = PackEncoder(
            capacity=config.capacity,
            patch_size=config.patch_size,
            text_length=config.text_length,
            pad_multiple=config.pad_multiple,
            seed=config.seed,
            spec=manifest.latent_spec if manifest else None,
            # Where a buffer holds an epoch, what waits would come in the next one.
            carry=config.packing_buffer < self._share,
        )
        self._workers = WorkerConfig(
            rank=rank,
            world_size=world_size,
            num_workers=config.num_workers,
            seed_offset=config.seed,
            global_error_handler=reraise_exception,  # the default logs a bad sample and goes on without it
        )
        if config.split == "train" and self._share < 1:
            raise ValueError(
                f"{folder} has {available['train']} training samples for {world_size} ranks of "
                f"{max(1, config.num_workers)} workers; each needs at least one"
            )
        self._loader: Any = None
        self._packs: Iterator[LatentPack] | None = None

    def _check_capacity(self, manifest: Manifest | None) -> None:
        usable = usable_capacity(self.config.capacity, self.config.pad_multiple)
        pf, ph, pw = self.config.patch_size
        for shape in manifest.shapes if manifest else ():
            _, frames, rows, columns = shape.latent
            tokens = (frames // pf) * (rows // ph) * (columns // pw)
            if shape.split == self.config.split and tokens > usable:
                raise ValueError(
                    f"{self.config.path} has {shape.samples} samples of {shape.frames}x{shape.height}x{shape.width} "
                    f"with {tokens} tokens each, and a pack holds {usable}: raise the capacity, or prepare the data "
                    "with fewer frames or a smaller size"
                )

    @property
    def _endless(self) -> bool:
        return self.config.split == "train"

    def _build(self) -> Any:
        buffer = max(1, min(self.config.packing_buffer, self._share))
        common: dict[str, Any] = {
            "split_part": self.config.split,
            "worker_config": self._workers,
            "batch_size": None,
            "packing_buffer_size": buffer,
            "task_encoder": self._encoder,
        }
        if self._endless:
            sequence = -(-self._share // _MOST_SEQUENCES)
            # Where each sample is drawn by itself an epoch is a full permutation, and a buffer would only mix epochs.
            shuffle = min(self.config.shuffle_buffer, self._share) if sequence > 1 else 0
            dataset = get_train_dataset(
                self.config.path, shuffle_buffer_size=shuffle or None, max_samples_per_sequence=sequence, **common
            )
        else:
            dataset = get_val_dataset(self.config.path, **common)
        loader = get_savable_loader(
            dataset,
            # A checkpoint a pack: the state is then that of the last pack drawn, and a resume skips nothing.
            checkpoint_every_sec=0,
            checkpoint_every_min_n_samples=1,
            n_checkpoints=_PREFETCH * max(1, self.config.num_workers) + 2,
            prefetch_factor=_PREFETCH,
            gc_collect_every_n_steps=0,
            watchdog_timeout_seconds=None,
        )
        loader.pin_memory = False
        # torch draws a seed for each iterator; from the global generator, if none is given.
        loader.generator = torch.Generator().manual_seed(self.config.seed)
        return loader

    def _current(self) -> Any:
        if self._loader is None:
            self._loader = self._build()
        return self._loader

    def __iter__(self) -> Iterator[LatentPack]:
        """``train``: one endless iterator, the same one each time; other splits: a new pass each time."""
        if not self._endless:
            return self._draw(self._build())
        if self._packs is None:
            self._packs = self._draw(self._current())
        return self._packs

    @staticmethod
    def _draw(loader: Any) -> Iterator[LatentPack]:
        # A generator function, because Energon's workers must not be asked for before the first pack: from iter() on
        # it waits for the state of workers that are not there yet.
        for sample in loader:
            yield sample.pack

    def _place(self) -> dict[str, Any]:
        return {
            "state_version": STATE_VERSION,
            "energon": energon_version,
            "rank": self.rank,
            "world_size": self.world_size,
            "num_workers": self.config.num_workers,
            "split": self.config.split,
            "packing_buffer": self.config.packing_buffer,
            "shuffle_buffer": self.config.shuffle_buffer,
            "dataset": self.dataset_fingerprint,
            **settings_of(self._encoder),
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values from which ``load_state_dict`` continues with the very next pack.

        Raises:
            ValueError: the split is read once and in order; such a pass is begun anew instead.
        """
        if not self._endless:
            raise ValueError(f"the split {self.config.split!r} has no state: each iteration is a whole pass")
        return {**self._place(), "state": to_plain(self._saved())}

    def _saved(self) -> Any:
        # A worker answers from the moment its command thread runs, which may be before it has taken up its own state;
        # Energon 7.4.1 then hands out no state and a count of samples to skip that is one too high. Ask again.
        deadline = time.monotonic() + 60
        while True:
            saved = self._current().save_state_rank()
            workers = saved.worker_states if saved is not None and self.config.num_workers else ()
            if all(worker.state is not None for worker in workers):
                return saved
            if time.monotonic() > deadline:
                raise RuntimeError("a worker of the loader has not started after 60 s; its state cannot be saved")
            time.sleep(0.01)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state_dict`` was called; before the iteration starts.

        Raises:
            ValueError: it has started, or the state is of another dataset, configuration or place.
        """
        if self._packs is not None or not self._endless:
            raise ValueError("a loader's state is loaded before its iteration starts, and for the train split only")
        here = self._place()
        if missing := sorted({*here, "state"} - set(state)):
            raise ValueError(f"the loader's state has no {', '.join(missing)}; expected what state_dict returned")
        if differing := [
            f"{name} {state[name]!r} instead of {here[name]!r}" for name in here if state[name] != here[name]
        ]:
            raise ValueError(
                f"the loader's state is of another run: {', '.join(differing)}; "
                "resume with the same dataset, settings and data-parallel size"
            )
        restored = from_plain(state["state"])
        self._loader = self._build()
        try:
            self._loader.restore_state_rank(restored)
        except (AssertionError, AttributeError, KeyError, TypeError) as error:
            self._loader = None
            raise ValueError(f"the loader's state is damaged: {error!r}") from error
