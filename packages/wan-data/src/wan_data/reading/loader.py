"""The loader of packed training batches: Energon's loader with an exact resume from plain JSON values.

It needs neither torch.distributed nor a GPU nor Megatron-Core: the caller passes the data-parallel rank.
"""

import dataclasses
import gc
import inspect
import time
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import torch
from megatron.energon import WorkerConfig, get_savable_loader, load_dataset
from megatron.energon import __version__ as energon_version
from megatron.energon.errors import reraise_exception
from megatron.energon.metadataset.loader_interface import DatasetBlendMode

from wan_data.reading.datasets import OpenPart, check_sizes, common_latent_spec, open_split
from wan_data.reading.loader_state import from_plain, to_plain
from wan_data.reading.packing import usable_capacity
from wan_data.reading.task_encoder import PART, PackEncoder, settings_of
from wan_model.pack import LatentPack

STATE_VERSION = 1
# Samples are drawn from at most this many sequences of neighbours, because a state lists all sequences.
_MOST_SEQUENCES = 20_000
_PREFETCH = 2
# A worker imports torch first, which takes a minute on a busy machine.
_WORKER_TIMEOUT = 600.0


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
    """The dataset to load and how to pack it.

    Attributes:
        path: the dataset's folder, or the YAML file of a blend of several (see ``wan_data.reading.blends``).
        capacity: tokens of a pack, padding included.
        split: ``train`` is an endless stream in random order; any other split is read once, in order.
        text_length: tokens that texts are zero-padded to.
        patch_size: latent positions (frames, rows, columns) of a token.
        pad_multiple: packs are padded to a multiple of this many tokens (tensor and context parallelism).
        packing_buffer: number of samples that are packed together, limited to a worker's share of the split. Samples
            of the emptiest packs are carried over to the next buffer once, so a sample is at most one buffer late.
        shuffle_buffer: number of samples that are shuffled among each other if a worker's share is too large to permute
            single samples. Consecutive epochs then overlap; without it every sample is drawn exactly once per epoch.
        num_workers: reader processes; 0 reads in this process.
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


class PackLoader:
    """Iterates over the packs of one data-parallel rank.

    Ranks of one tensor-, pipeline- or context-parallel group pass the same ``rank`` and get identical packs; different
    ranks get different samples of each epoch. The order depends only on the seed, the rank, the world size and the
    number of workers.

    Args:
        config: the dataset and the packing.
        rank, world_size: of data parallelism.

    Raises:
        ValueError: the dataset is missing, damaged, unsafe, or too small for the number of ranks and workers, or a
            sample does not fit into a pack.
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
        self._parts = open_split(config.path, config.split)
        check_sizes(self._parts, usable_capacity(config.capacity, config.pad_multiple), config.patch_size)
        self._readers = world_size * max(1, config.num_workers)
        self._share = sum(one.samples for one in self._parts) // self._readers
        self._encoder = PackEncoder(
            capacity=config.capacity,
            patch_size=config.patch_size,
            text_length=config.text_length,
            pad_multiple=config.pad_multiple,
            seed=config.seed,
            spec=common_latent_spec(self._parts),
            # If a buffer holds an epoch, samples that are carried over would be in the next epoch.
            carry=config.packing_buffer < self._share,
        )
        self._workers = WorkerConfig(
            rank=rank,
            world_size=world_size,
            num_workers=config.num_workers,
            seed_offset=config.seed,
            global_error_handler=reraise_exception,  # the default logs an invalid sample and skips it
        )
        for one in self._parts if self._endless else ():
            # A reader without samples of a dataset would draw from the others only.
            if one.samples < self._readers:
                raise ValueError(
                    f"{one.part.folder} has {one.samples} training samples for {world_size} ranks of "
                    f"{max(1, config.num_workers)} workers; each needs at least one"
                )
        self._closed = False
        self._loader: Any = None
        self._packs: Generator[LatentPack, None, None] | None = None

    @property
    def _endless(self) -> bool:
        return self.config.split == "train"

    def _build(self) -> Any:
        common: dict[str, Any] = {
            "worker_config": self._workers,
            "batch_size": None,
            "packing_buffer_size": max(1, min(self.config.packing_buffer, self._share)),
        }
        if self._endless:
            # If single samples are drawn, an epoch is a full permutation, and a buffer would only mix epochs.
            drawn_singly = all(self._run_length(one) == 1 for one in self._parts)
            dataset = self._encoder.build_train_datasets(
                datasets=[self._open(one) for one in self._parts],
                blend_mode=DatasetBlendMode.DATASET_WEIGHT,
                shuffle_buffer_size=None if drawn_singly else min(self.config.shuffle_buffer, self._share) or None,
                **common,
            )
        else:
            dataset = self._encoder.build_val_datasets(datasets=[self._open(one) for one in self._parts], **common)
        loader = get_savable_loader(
            dataset,
            # A state for every pack, so that a resume starts right after the last pack that was drawn.
            checkpoint_every_sec=0,
            checkpoint_every_min_n_samples=1,
            n_checkpoints=_PREFETCH * max(1, self.config.num_workers) + 2,
            prefetch_factor=_PREFETCH,
            gc_collect_every_n_steps=0,
            watchdog_timeout_seconds=None,
        )
        loader.pin_memory = False
        if self.config.num_workers:
            # Energon's reader of dataset.yaml leaves exceptions with their frames in a cycle. Those refer to all frames
            # that called it and their variables, this loader among them, whose workers should end when it is deleted.
            gc.collect()
        # torch draws a seed for each iterator, by default from the global generator.
        loader.generator = torch.Generator().manual_seed(self.config.seed)
        return loader

    def _run_length(self, one: OpenPart) -> int:
        return -(-(one.samples // self._readers) // _MOST_SEQUENCES)

    def _open(self, one: OpenPart) -> Any:
        more = {"max_samples_per_sequence": self._run_length(one)} if self._endless else {}
        (loaded,) = (
            load_dataset(one.part.folder)
            .get_datasets(
                training=self._endless,
                split_part=one.part.split,
                worker_config=self._workers,
                decoder=self._encoder.decoder,
                subflavors={PART: one.part.name},
                **more,
            )
            .datasets
        )
        return dataclasses.replace(loaded, weight=one.part.weight)

    def _current(self) -> Any:
        if self._loader is None:
            self._loader = self._build()
        return self._loader

    def __iter__(self) -> Iterator[LatentPack]:
        """For ``train`` always the same endless iterator; for other splits a new pass over the split.

        Raises:
            ValueError: the loader is closed, or an error has ended the iterator.
        """
        if not self._endless:
            return self._draw(self._build())
        self._check_open()
        if self._packs is None:
            self._packs = self._draw(self._current())
        elif inspect.getgeneratorstate(self._packs) == inspect.GEN_CLOSED:
            raise ValueError("the loader's iterator was ended by an error; make a new loader, and load the last state")
        return self._packs

    @staticmethod
    def _draw(loader: Any) -> Generator[LatentPack, None, None]:
        # A generator function, so that iter() of Energon's loader is called with the first pack: from then on its state
        # is that of the workers, which have to be started.
        ended = True
        try:
            for sample in loader:
                yield sample.pack
        except GeneratorExit:
            raise
        except BaseException:
            ended = False  # interrupted, for example: the state can still be asked of the workers
            raise
        finally:
            if ended:
                # Energon's loader and its iterator refer to each other. When they are collected as a cycle, the queues
                # end before torch has told the workers to, and it waits five seconds for each worker.
                loader._epoch_iterator = loader._iterator = None

    def close(self) -> None:
        """End the worker processes of the endless iterator; the deletion of the loader does so, too."""
        self._closed = True
        if self._packs is not None:
            self._packs.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the loader is closed; make a new one, and load a state that was saved before")

    def _identity(self) -> dict[str, Any]:
        return {
            "state_version": STATE_VERSION,
            "energon": energon_version,
            "rank": self.rank,
            "world_size": self.world_size,
            "num_workers": self.config.num_workers,
            "split": self.config.split,
            "packing_buffer": self.config.packing_buffer,
            "shuffle_buffer": self.config.shuffle_buffer,
            "dataset": [one.fingerprint for one in self._parts],
            **settings_of(self._encoder),
        }

    def state_dict(self) -> dict[str, Any]:
        """The state as plain JSON values; ``load_state_dict`` continues with the next pack.

        Raises:
            ValueError: the split is read once and in order, which has no state; or the loader is closed.
        """
        if not self._endless:
            raise ValueError(f"the split {self.config.split!r} has no state: each iteration is a whole pass")
        self._check_open()
        return {**self._identity(), "state": to_plain(self._saved())}

    def _saved(self) -> Any:
        # A worker responds as soon as its command thread runs, which may be before it has restored its own state.
        # Energon 7.4.1 then returns no state and a count of samples to skip that is one too high, so repeat.
        deadline = time.monotonic() + _WORKER_TIMEOUT
        while True:
            saved = self._current().save_state_rank()
            workers = saved.worker_states if saved is not None and self.config.num_workers else ()
            if all(worker.state is not None for worker in workers):
                return saved
            if time.monotonic() > deadline:
                raise RuntimeError("a worker of the loader has not started after 10 minutes; its state cannot be saved")
            time.sleep(0.01)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the pack at which ``state_dict`` was called; call it before the iteration starts.

        Raises:
            ValueError: the iteration has started, or the state is of another dataset, configuration or rank.
        """
        if self._packs is not None or not self._endless:
            raise ValueError("a loader's state is loaded before its iteration starts, and for the train split only")
        own = self._identity()
        if missing := sorted({*own, "state"} - set(state)):
            raise ValueError(f"the loader's state has no {', '.join(missing)}; expected what state_dict returned")
        if differing := [
            f"{name} {state[name]!r} instead of {own[name]!r}" for name in own if state[name] != own[name]
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
