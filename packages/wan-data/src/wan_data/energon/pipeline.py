"""Energon's datasets and its loader with the same behaviour on every version from 6.0.1 on.

Only those parts of Energon are used that its versions have in common: it numbers, draws, blends and buffers samples,
and saves its position. Its readers of metadata and of shards, its decoders, task encoders and cookers differ between
versions, or trust what they read, and take no part. What differs in the others is found by looking for it.
"""

import functools
import inspect
import re
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, Protocol

import torch

from wan_data.energon.samples import AwaitedSample, RawSample, SampleReader, Source, cook_unless_awaited, result_of
from wan_data.energon.version import unusable
from wan_data.energon.worker_processes import WorkerContext

try:
    from megatron.energon import WorkerConfig, get_savable_loader
    from megatron.energon.flavors.webdataset.sample_loader import SliceState, WebdatasetSampleLoaderDataset
    from megatron.energon.flavors.webdataset.sharder import Sharder
    from megatron.energon.flavors.webdataset.structs import ShardInfo
    from megatron.energon.rng import SystemRngState
    from megatron.energon.savable_loader import SavableDataLoaderState, SavableDatasetCheckpoint, SavableDatasetState
    from megatron.energon.state import FlexState
    from megatron.energon.wrappers import (
        BlendDataset,
        ConcatDataset,
        MapDataset,
        PackingDataset,
        RepeatDataset,
        ShuffleBufferDataset,
    )
except ImportError as error:
    raise unusable(f"{error}; wan-data is tested with 6.0.1, 7.4.0 and 7.4.1") from error

# The types of a loader's state, and of the mappings in it.
MAPPING = FlexState
STATES = (SavableDataLoaderState, SavableDatasetCheckpoint, SavableDatasetState, SystemRngState, SliceState)
# Shards that are open at once, and drawn from in turn, while training; Energon's own default.
OPEN_SHARDS = 16
_PREFETCH = 2
# Samples that are read ahead where they are read in order.
_AHEAD = 8
# A worker imports torch first, which takes a minute on a busy machine.
_WORKER_TIMEOUT = 600.0


class Packer(Protocol):
    """Chooses the packs; see ``wan_data.reading.pack_encoder.PackEncoder``."""

    carry: bool

    def choose_packs(self, samples: Sequence[Any], carried: int) -> tuple[list[list[Any]], list[Any]]:
        """Groups of a buffer's samples, and the samples to carry over; ``carried`` of them were carried over before."""

    def pack(self, samples: Sequence[Any]) -> Any:
        """A group as one pack with ``__restore_key__``."""


# -- bad samples -------------------------------------------------------------------------------------------------------


def _raise(error: Exception, *_: object) -> None:
    raise error


def _accepts(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters


def _raising() -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of the workers and of maps that let errors through; by default Energon logs them and goes on."""
    if _accepts(WorkerConfig, "global_error_handler"):
        return {"global_error_handler": _raise}, {}
    if _accepts(MapDataset, "error_handler"):
        return {}, {"error_handler": _raise}
    raise unusable("it takes no handler of errors and would leave out invalid samples; 6.0.1 and 7.4 take one")


def _map(dataset: Any, function: Callable[[Any], Any], workers: "Workers") -> Any:
    return MapDataset(dataset, function, stateless_map_fn=True, worker_config=workers, **_raising()[1])


# -- datasets ----------------------------------------------------------------------------------------------------------


class Workers(WorkerConfig):
    """The readers of a data-parallel rank. After a resume the first process is the worker whose turn it is.

    Energon 6.0.1 numbers the others in reverse, so that three or more would continue in another order.
    """

    def rank_worker_id(self) -> int:
        """The number of this worker among those of its rank."""
        process = torch.utils.data.get_worker_info()
        if process is None:
            return int(super().rank_worker_id())
        return int((process.id + self.worker_id_offset) % process.num_workers)


def make_workers(*, rank: int, world_size: int, num_workers: int, seed: int) -> Workers:
    """The readers of a data-parallel rank; 0 workers read in this process.

    Raises:
        ValueError: the installed Energon would leave out invalid samples.
    """
    return Workers(rank=rank, world_size=world_size, num_workers=num_workers, seed_offset=seed, **_raising()[0])


def training_samples(sources: Sequence[Source], workers: Workers, *, shuffle_buffer: int = 0) -> Any:
    """An endless stream of cooked samples: sources are drawn by weight, each in permutations of its own."""
    streams = [RepeatDataset(one, worker_config=workers) for one in _cooked(sources, workers, training=True)]
    if len(streams) == 1:
        (stream,) = streams
    else:
        weighted = [(stream, one.weight) for stream, one in zip(streams, sources, strict=True)]
        stream = BlendDataset(*weighted, worker_config=workers)
    if shuffle_buffer > 1:
        stream = ShuffleBufferDataset(stream, size=shuffle_buffer, worker_config=workers)
    return stream


def samples_in_order(sources: Sequence[Source], workers: Workers) -> Any:
    """All cooked samples once, in order, one source after another."""
    streams = _cooked(sources, workers, training=False)
    return streams[0] if len(streams) == 1 else ConcatDataset(*streams, worker_config=workers)


def _cooked(sources: Sequence[Source], workers: Workers, *, training: bool) -> list[Any]:
    readers = max(1, workers.num_workers) * workers.world_size
    cooked, before = [], 0
    for one in sources:
        # The readers that get one sample more follow those that got one of the sources before.
        raw = _raw(one, workers, rotation=before % readers, training=training)
        cooked.append(_map(raw, functools.partial(cook_unless_awaited, one.cook), workers))
        before += sum(count for _, count in one.shards)
    return cooked


def _raw(source: Source, workers: Workers, *, rotation: int, training: bool) -> Any:
    # Of these, only the counts are used.
    shards = [ShardInfo(name=name, path=name, count=count) for name, count in source.shards]
    samples = WebdatasetSampleLoaderDataset(
        # Of a permutation of single samples the next ones are not known; there, the buffer that is packed is ahead.
        join_readers=[SampleReader(source, ahead=0 if training else _AHEAD)],
        workers_sample_slice_offsets=Sharder.shard_workers(
            shards, workers, max_samples_per_sequence=source.run_length, rotation_offset=rotation
        ),
        worker_config=workers,
        shuffle_over_epochs=1 if training else None,
        parallel_slice_iters=OPEN_SHARDS if training else 1,
    )
    return _map(samples, _only, workers)


def _only(found: Any) -> RawSample | AwaitedSample:
    (sample,) = found.data
    assert isinstance(sample, RawSample | AwaitedSample)
    return sample


# -- packing -----------------------------------------------------------------------------------------------------------


class _CarryingPackingDataset(PackingDataset):
    """Packs of samples; some samples are carried over to the next buffer, and saved with the state.

    The iteration is written anew: Energon 6.0.1 fails at the end of a split, and would log an error and leave out its
    samples. A saved state holds the names of this class and of ``_carried``; renaming them breaks the resume of older
    runs.
    """

    _savable_fields = (*PackingDataset._savable_fields, "_carried")

    def __init__(self, dataset: Any, packer: Packer, buffer: int, workers: Workers) -> None:
        self._packer = packer
        super().__init__(
            dataset,
            buffer_size=buffer,
            pre_packer=packer.choose_packs,
            final_packer=packer.pack,
            final_packer_stateless=True,
            worker_config=workers,
        )

    def reset_state_own(self) -> None:
        super().reset_state_own()
        self._carried = 0

    def __iter__(self) -> Iterator[Any]:
        samples = iter(self.dataset)
        self._pre_packing_buffer.worker_start()
        self._reading_buffer.worker_start()
        while self._fill(samples):
            if not self._pre_packing_lengths:
                self._choose(carry=self._packer.carry)
            yield self._next()
        while self._pre_packing_lengths:
            yield self._next()
        if self._reading_buffer._restore_keys:
            self._choose(carry=False)
        while self._pre_packing_lengths:
            yield self._next()

    def _fill(self, samples: Iterator[Any]) -> bool:
        """Read until the buffers are full; False if there are no more samples."""
        reading, chosen = self._reading_buffer, self._pre_packing_buffer
        while len(reading._restore_keys) + len(chosen._restore_keys) < self.buffer_size:
            try:
                reading.append(next(samples))
            except StopIteration:
                return False
        return True

    def _choose(self, *, carry: bool) -> None:
        # Samples that are carried over precede those read next.
        samples = [result_of(one) for one in iter(self._reading_buffer)]  # its length cannot be asked on every version
        self._reading_buffer.clear()
        with self._pre_packing_sample_index.ctx():
            packs, rest = self._packer.choose_packs(samples, self._carried if carry else len(samples))
        for sample in rest:
            self._reading_buffer.append(sample)
        self._carried = len(rest)
        for pack in packs:
            self._pre_packing_buffer.extend(pack)
            self._pre_packing_lengths.append(len(pack))

    def _next(self) -> Any:
        length = self._pre_packing_lengths.pop(0)
        samples = [result_of(one) for one in self._pre_packing_buffer[:length]]
        del self._pre_packing_buffer[:length]
        with self._final_packing_sample_index.ctx() as number:
            pack = self._packer.pack(samples)
        pack.__restore_key__ = (type(self).__name__, number, *(sample.__restore_key__ for sample in samples))
        return pack


def packed(samples: Any, packer: Packer, workers: Workers, *, buffer: int) -> Any:
    """The packs of a stream of cooked samples, of which ``buffer`` are packed together."""
    return _CarryingPackingDataset(samples, packer, buffer, workers)


# -- the loader --------------------------------------------------------------------------------------------------------


def _without_traceback(error: ValueError) -> ValueError:
    """An error of a worker process as that process has raised it: torch puts its traceback before it."""
    text = str(error)
    lines = text.rstrip().split("\n")
    if re.match(r"Caught \w+ in DataLoader worker process \d+\.$", lines[0]):
        return ValueError(re.sub(r"^[\w.]+: ", "", lines[-1]))
    return error


class ExactLoader:
    """Iterates over a dataset once, with a state after every item from which another one continues exactly.

    Args:
        dataset: of ``packed``.
        workers: its readers.
        seed: for torch, which draws a number for each iterator, by default from the global generator.
    """

    def __init__(self, dataset: Any, workers: Workers, *, seed: int) -> None:
        self._workers = workers.num_workers
        watchdog = _accepts(get_savable_loader, "watchdog_timeout_seconds")
        self._loader = get_savable_loader(
            dataset,
            # A state for every item, so that a resume starts right after the last one that was drawn.
            checkpoint_every_sec=0,
            checkpoint_every_min_n_samples=1,
            # One of them for the item before the last, see ``position``.
            n_checkpoints=_PREFETCH * max(1, self._workers) + 3,
            prefetch_factor=_PREFETCH,
            gc_collect_every_n_steps=0,
            **({"watchdog_timeout_seconds": None} if watchdog else {}),
        )
        self._loader.pin_memory = False
        self._loader.generator = torch.Generator().manual_seed(seed)
        if self._workers:
            # Forked, because datasets cannot be pickled; Python 3.14 does not by default.
            self._loader.multiprocessing_context = WorkerContext()
        self._restored: Any = None
        self._running = False

    def __iter__(self) -> Generator[Any, None, None]:
        """The items; worker processes start with the first one, and end when the generator is closed."""
        self._running = True
        ended = True
        try:
            yield from self._loader
        except GeneratorExit:
            raise
        except ValueError as error:
            ended = False
            raise _without_traceback(error) from None
        except BaseException:
            ended = False  # interrupted, for example: the state can still be asked of the workers
            raise
        finally:
            if ended:
                # Energon's loader and its iterator refer to each other. When they are collected as a cycle, the queues
                # end before torch has told the workers to, and it waits five seconds for each worker.
                for name in ("_epoch_iterator", "_persistent_iterator", "_iterator"):
                    if hasattr(self._loader, name):
                        setattr(self._loader, name, None)

    def state(self) -> Any:
        """The state after the last item; None before the first one if workers read.

        Raises:
            RuntimeError: a worker does not start.
        """
        if not self._running and self._restored is not None:
            return self._restored  # Energon 6.0.1 has none before its workers run
        # A worker responds as soon as its command thread runs, which may be before it has restored its own state.
        # Energon then returns no state and a count of samples to skip that is one too high, so repeat.
        deadline = time.monotonic() + _WORKER_TIMEOUT
        while True:
            saved = self._loader.save_state_rank()
            workers = saved.worker_states if saved is not None and self._workers else ()
            if all(worker.state is not None for worker in workers):
                return saved
            if time.monotonic() > deadline:
                raise RuntimeError("a worker of the loader has not started after 10 minutes; its state cannot be saved")
            time.sleep(0.01)

    def position(self) -> Callable[[], Any]:
        """A function that returns the state of now, until more than one further item is drawn."""
        if not self._workers or not self._running:
            saved = self.state()
            return lambda: saved
        # Workers are asked only when the state is needed: they have the states of their last items.
        loader = self._loader
        last, turn = list(loader._worker_sample_counters), loader._next_worker_id

        def state() -> Any:
            now = loader._worker_sample_counters, loader._next_worker_id
            loader._worker_sample_counters, loader._next_worker_id = last, turn
            try:
                return self.state()
            finally:
                loader._worker_sample_counters, loader._next_worker_id = now

        return state

    def restore(self, state: Any) -> None:
        """Continue after the item at which ``state`` was called, before the iteration starts.

        Raises:
            AssertionError, AttributeError, KeyError or TypeError: the state is damaged.
        """
        self._loader.restore_state_rank(state)
        if state is not None and self._workers:
            # Energon 6.0.1 forgets who is next, and what workers that have not been asked since had returned before.
            self._loader._next_worker_id = state.next_worker_id
            self._loader._worker_sample_counters = [
                worker.state.sample_index + worker.offset - 1 for worker in state.worker_states
            ]
        self._restored = state
