"""The data iterator of the loop, which draws one pack ahead while a step is computed.

Every pack has a number in the run: pack n of data-parallel rank r of R is number n*R + r. Noise is seeded by that
number, so it differs between data-parallel ranks, is equal on the ranks that share a pack, and continues after a
resume without any state. Each rank of a tensor- or pipeline-parallel group reads the same data.
"""

import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch

from wan_model import LatentPack

# How long the end of a run that has failed waits for a loader that does not return.
_CLOSE_SECONDS = 10.0


@runtime_checkable
class Loader(Protocol):
    """An endless stream of packs with a position."""

    def __iter__(self) -> Iterator[LatentPack]:
        """The packs from the current position on."""

    def position(self) -> Callable[[], dict[str, Any]]:
        """A function that returns the state of now, plain values, until one more pack has been drawn."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the position of a state."""


@runtime_checkable
class ReadsAhead(Protocol):
    """A loader with threads of its own, as ``wan_data.reading.loader.PackLoader`` has for a dataset in a store."""

    def settle(self) -> None:
        """Wait until none of them reads."""


@dataclasses.dataclass
class NumberedPack:
    """A pack and its number in the run."""

    number: int
    pack: LatentPack


class _PrefetchedPack:
    """The next pack, prefetched by a thread of its own that ends with it; and the position before it.

    Args:
        loader: not used by anything else until ``settle`` has returned.
        packs: its iterator.
        pin: the CUDA device to copy to; the pack is then in page-locked memory.
    """

    def __init__(self, loader: Loader, packs: Iterator[LatentPack], pin: torch.device | None) -> None:
        self._loader, self._packs, self._pin = loader, packs, pin
        self._position: Callable[[], dict[str, Any]] | None = None
        self._pack: LatentPack | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._draw, name="next pack", daemon=True)
        self._thread.start()

    def _draw(self) -> None:
        try:
            self._position = self._loader.position()
            pack = next(self._packs)
            if self._pin is not None:
                torch.cuda.set_device(self._pin)  # of this thread
                pack = pack.pin_memory()
            self._pack = pack
        except BaseException as error:  # raised by the step that the pack was for
            self._error = error

    def settle(self, seconds: float | None = None) -> None:
        """Wait for the thread, at most so long."""
        self._thread.join(seconds)

    def take(self) -> LatentPack:
        """The pack, or the error of drawing it."""
        self.settle()
        if self._error is not None:
            raise self._error
        assert self._pack is not None, "the thread has ended"
        return self._pack

    def state_before(self) -> dict[str, Any]:
        """The loader's state before this pack."""
        self.settle()
        if self._position is None:
            assert self._error is not None, "the thread has ended"
            raise self._error
        return self._position()


class PackIterator:
    """Numbered packs; the loader starts at the first ``next``, after a possible resume.

    With every pack that it returns it begins to draw the next one, which belongs to no state until it is returned.

    Args:
        loader: of the packs.
        rank, ranks: data-parallel rank and size.
        pin: a CUDA device that the packs will be copied to; None for a CPU.
        content: of the data, as ``wan_data.reading.fingerprint.digest_without_manifest`` has it.
    """

    def __init__(
        self, loader: Loader, rank: int, ranks: int, pin: torch.device | None = None, *, content: str | None = None
    ) -> None:
        self.loader, self.content = loader, content
        self.rank, self.ranks = rank, ranks
        self.drawn = 0
        self._pin = pin
        self._packs: Iterator[LatentPack] | None = None
        self._prefetched: _PrefetchedPack | None = None

    def resume(self, state: dict[str, Any], drawn: int) -> None:
        """Resume at a saved position.

        Args:
            state: what ``save_state`` returned on this data-parallel rank.
            drawn: number of packs that this rank had consumed, by the loop's count.

        Raises:
            ValueError: the state is of another rank, dataset or configuration.
        """
        position = {"rank": self.rank, "ranks": self.ranks, "drawn": drawn}
        if found := {key: state.get(key) for key in position if state.get(key) != position[key]}:
            wanted = {key: position[key] for key in found}
            raise ValueError(
                f"the checkpoint's loader state is of {found}, this run needs {wanted}: "
                "resume with the data-parallel size that the checkpoint was saved with"
            )
        self.loader.load_state_dict(state["loader"])
        theirs = state.get("content")
        if theirs is not None and self.content is not None and theirs != self.content:
            raise ValueError(
                f"the data's content is {self.content} where the checkpoint was trained on {theirs}; resume with the "
                "same data"
            )
        self.drawn = drawn

    def __iter__(self) -> "PackIterator":
        """Itself."""
        return self

    def __next__(self) -> NumberedPack:
        """The next pack with its number.

        Raises:
            ValueError: the loader's error in drawing this pack; also any other of its errors.
        """
        if self._packs is None:
            # On this thread, because worker processes are forked, which is safe only while no other computes.
            packs = iter(self.loader)
            pack = next(packs)
            self._packs = packs
        else:
            assert self._prefetched is not None, "made with every pack"
            pack = self._prefetched.take()
        number = self.drawn * self.ranks + self.rank
        self.drawn += 1
        self._prefetched = _PrefetchedPack(self.loader, self._packs, self._pin)
        return NumberedPack(number, pack)

    def settle(self) -> None:
        """Wait until the next pack is drawn: no thread runs then, so that this process may fork."""
        if self._prefetched is not None:
            self._prefetched.settle()
        if isinstance(self.loader, ReadsAhead):
            self.loader.settle()

    def close(self) -> None:
        """End the thread, if it does not hang; nothing is drawn afterwards."""
        if self._prefetched is not None:
            self._prefetched.settle(_CLOSE_SECONDS)

    def save_state(self) -> dict[str, Any]:
        """Plain values from which ``resume`` continues with the pack that ``next`` would return."""
        state = self.loader.position()() if self._prefetched is None else self._prefetched.state_before()
        saved = {"rank": self.rank, "ranks": self.ranks, "drawn": self.drawn, "loader": state}
        return saved if self.content is None else {**saved, "content": self.content}
