"""The loader of packed training batches: Energon's loader with an exact resume from plain JSON values.

It needs neither torch.distributed nor a GPU nor Megatron-Core: the caller passes the data-parallel rank.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

from wan_data.energon.pipeline import (
    OPEN_SHARDS,
    ExactLoader,
    make_workers,
    packed,
    samples_in_order,
    training_samples,
)
from wan_data.energon.samples import Source
from wan_data.energon.version import energon_version
from wan_data.reading.datasets import OpenPart, check_sizes, common_latent_spec, open_split
from wan_data.reading.loader_state import from_plain, to_plain
from wan_data.reading.pack_encoder import PackEncoder, settings_of
from wan_data.reading.packing import usable_capacity
from wan_data.shards.indexed_reader import IndexedShards
from wan_data.storage.location import StorePath
from wan_data.storage.range_cache import RangeCache
from wan_data.storage.transfers import Transfers
from wan_model.config import OFFICIAL_TEXT_LENGTH
from wan_model.pack import LatentPack

STATE_VERSION = 1
# Samples are drawn from at most this many sequences of neighbours, because a state lists all sequences.
_MOST_SEQUENCES = 20_000


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
    """The dataset to load and how to pack it.

    Attributes:
        path: the dataset's folder, or the YAML file of a blend of several (see ``wan_data.reading.blends``); either may
            be a URL of an object store.
        capacity: tokens of a pack, padding included.
        split: ``train`` is an endless stream in random order; any other split is read once, in order.
        text_length: tokens that texts are zero-padded to, which must be those of the model
            (``WanConfig.text_length``); None for those that the captions were cut to, 512 without a manifest.
        patch_size: latent positions (frames, rows, columns) of a token.
        pad_multiple: packs are padded to a multiple of this many tokens (tensor and context parallelism).
        packing_buffer: number of samples that are packed together, limited to a worker's share of the split. Samples
            of the emptiest packs are carried over to the next buffer once, so a sample is at most one buffer late.
        shuffle_buffer: number of samples that are shuffled among each other if a worker's share is too large to permute
            single samples. Consecutive epochs then overlap; without it every sample is drawn exactly once per epoch.
        num_workers: reader processes; 0 reads in this process.
        seed: of the order.
        cache_bytes: of what is read from a store, so many bytes are kept on a local disk for the next epoch, by all
            processes of a machine together; 0 for none. ``wan_data.storage.range_cache`` says where.
    """

    path: str
    capacity: int
    split: str = "train"
    text_length: int | None = None
    patch_size: tuple[int, int, int] = (1, 2, 2)
    pad_multiple: int = 1
    packing_buffer: int = 64
    shuffle_buffer: int = 0
    num_workers: int = 0
    seed: int = 1234
    cache_bytes: int = 0


def _capacity_of(identity: Mapping[str, Any]) -> int | None:
    """Tokens of a pack that samples may fill, by the identity in a state; None if that makes no sense."""
    capacity, multiple = identity["capacity"], identity["pad_multiple"]
    if not (type(capacity) is int and type(multiple) is int and 0 < multiple <= capacity):
        return None
    return usable_capacity(capacity, multiple)


class PackLoader:
    """Iterates over the packs of one data-parallel rank.

    Ranks of one tensor-, pipeline- or context-parallel group pass the same ``rank`` and get identical packs; different
    ranks get different samples of each epoch. The order depends only on the seed, the rank, the world size, the number
    of workers and the version of Energon.

    Args:
        config: the dataset and the packing.
        rank, world_size: of data parallelism.

    Raises:
        ValueError: the dataset is missing, damaged, unsafe, or too small for the number of ranks and workers, a sample
            does not fit into a pack, or the installed Energon is not one that this works with.
    """

    def __init__(self, config: LoaderConfig, *, rank: int, world_size: int) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size} does not exist; ranks count from 0")
        for name in ("packing_buffer", "text_length"):
            if (value := getattr(config, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if config.cache_bytes < 0:
            raise ValueError(f"cache_bytes is {config.cache_bytes}; it must be at least 0, which is for no cache")
        if config.num_workers < 0:
            raise ValueError(f"num_workers is {config.num_workers}; it must be at least 0")
        self.config, self.rank, self.world_size = config, rank, world_size
        self._energon = energon_version()
        self._parts = open_split(config.path, config.split)
        check_sizes(self._parts, usable_capacity(config.capacity, config.pad_multiple), config.patch_size)
        spec = common_latent_spec(self._parts)
        text_length = config.text_length or (spec.text_length if spec is not None else OFFICIAL_TEXT_LENGTH)
        self._readers = world_size * max(1, config.num_workers)
        self._share = sum(one.samples for one in self._parts) // self._readers
        self._encoder = PackEncoder(
            capacity=config.capacity,
            patch_size=config.patch_size,
            text_length=text_length,
            pad_multiple=config.pad_multiple,
            seed=config.seed,
            spec=spec,
            # If a buffer holds an epoch, samples that are carried over would be in the next epoch.
            carry=config.packing_buffer < self._share,
        )
        self._workers = make_workers(rank=rank, world_size=world_size, num_workers=config.num_workers, seed=config.seed)
        for one in self._parts if self._endless else ():
            # A reader without samples of a dataset would draw from the others only.
            if one.samples < self._readers:
                raise ValueError(
                    f"{one.part.folder} has {one.samples} training samples for {world_size} ranks of "
                    f"{max(1, config.num_workers)} workers; each needs at least one"
                )
        in_store = any(isinstance(one.part.folder, StorePath) for one in self._parts)
        self._cache = RangeCache(config.cache_bytes) if config.cache_bytes and in_store else None
        self._transfers = Transfers()
        self._closed = False
        self._loader: ExactLoader | None = None
        self._packs: Generator[LatentPack, None, None] | None = None

    @property
    def _endless(self) -> bool:
        return self.config.split == "train"

    def _build(self) -> ExactLoader:
        sources = [self._source(one) for one in self._parts]
        if self._endless:
            # If single samples are drawn, an epoch is a full permutation, and a buffer would only mix epochs.
            drawn_singly = all(one.run_length == 1 for one in sources)
            buffer = 0 if drawn_singly else min(self.config.shuffle_buffer, self._share)
            samples = training_samples(sources, self._workers, shuffle_buffer=buffer)
        else:
            samples = samples_in_order(sources, self._workers)
        buffer = max(1, min(self.config.packing_buffer, self._share))
        packs = packed(samples, self._encoder, self._workers, buffer=buffer)
        return ExactLoader(packs, self._workers, seed=self.config.seed)

    def _source(self, one: OpenPart) -> Source:
        return Source(
            shards=one.shards,
            read=IndexedShards(
                one.part.folder, one.shards, OPEN_SHARDS, listing=one.part.metadata.listing, cache=self._cache
            ).read,
            cook=functools.partial(self._encoder.cook, one.part.name),
            weight=one.part.weight,
            run_length=-(-(one.samples // self._readers) // _MOST_SEQUENCES) if self._endless else None,
            submit=self._transfers.submit if isinstance(one.part.folder, StorePath) else None,
        )

    def _current(self) -> ExactLoader:
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
    def _draw(loader: ExactLoader) -> Generator[LatentPack, None, None]:
        items = iter(loader)
        try:
            for sample in items:
                yield sample.pack
        finally:
            items.close()

    def close(self) -> None:
        """End the worker processes of the endless iterator; the deletion of the loader does so, too."""
        self._closed = True
        self._transfers.cancel()
        if self._packs is not None:
            self._packs.close()

    def settle(self, seconds: float = 60.0) -> None:
        """Wait until no thread of this process reads ahead from a store, at most so long: then it may fork."""
        self._transfers.settle(seconds)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the loader is closed; make a new one, and load a state that was saved before")

    def _identity(self) -> dict[str, Any]:
        return {
            "state_version": STATE_VERSION,
            "energon": self._energon,
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
        return self.position()()

    def position(self) -> Callable[[], dict[str, Any]]:
        """A function that returns what ``state_dict`` would return now, until more than one further pack is drawn.

        So a pack can be drawn before the state without it is needed. Asking worker processes for a state makes them
        wait, and a state is large; this is neither.

        Raises:
            ValueError: as ``state_dict``.
        """
        if not self._endless:
            raise ValueError(f"the split {self.config.split!r} has no state: each iteration is a whole pass")
        self._check_open()
        state = self._current().position()

        def plain() -> dict[str, Any]:
            self._check_open()
            return {**self._identity(), "state": to_plain(state())}

        return plain

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the pack at which ``state_dict`` was called; call it before the iteration starts.

        Raises:
            ValueError: the iteration has started, or the state is of another dataset, configuration, rank or version
                of Energon.
        """
        if self._packs is not None or not self._endless:
            raise ValueError("a loader's state is loaded before its iteration starts, and for the train split only")
        own = self._identity()
        if missing := sorted({*own, "state"} - set(state)):
            raise ValueError(f"the loader's state has no {', '.join(missing)}; expected what state_dict returned")
        if state["energon"] != self._energon:
            raise ValueError(
                f"the loader's state was saved with Megatron-Energon {state['energon']}, and {self._energon} is "
                "installed, which draws samples in another order; resume with the version that saved it"
            )
        # Packs are padded when their samples are chosen, so another multiple that leaves samples the same capacity, as
        # of another parallel layout, changes none.
        padding = {"capacity", "pad_multiple"} if _capacity_of(state) == _capacity_of(own) is not None else set()
        if differing := [
            f"{name} {state[name]!r} instead of {own[name]!r}"
            for name in own
            if state[name] != own[name] and name not in padding
        ]:
            raise ValueError(
                f"the loader's state is of another run: {', '.join(differing)}; "
                "resume with the same dataset, settings and data-parallel size"
            )
        restored = from_plain(state["state"])
        loader = self._build()
        try:
            loader.restore(restored)
        except (AssertionError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"the loader's state is damaged: {error!r}") from error
        self._loader = loader
