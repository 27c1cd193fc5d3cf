"""Decoder processes that several tests use one after another."""

from typing import Any, ClassVar

from wan_data.video.decoder_process import Decoder


class ReusedDecoder(Decoder):
    """A decoder that takes over the idle process of an earlier one: starting a process takes seconds."""

    # By the program that they run, and their threads.
    idle: ClassVar[dict[tuple[str, int], list[tuple[Any, Any]]]] = {}

    def _start(self) -> None:
        if not self.idle.get((self._program, self._threads)):
            super()._start()
            return
        self._child, self._connection = self.idle[self._program, self._threads].pop()
        self._ready = True

    def __exit__(self, *error: object) -> None:
        if self._child is not None and self._connection is not None and self._ready and not self._jobs:
            self.idle.setdefault((self._program, self._threads), []).append((self._child, self._connection))
            self._child = self._connection = None
        self._kill()


def end_idle_decoders() -> None:
    for (program, threads), idle in ReusedDecoder.idle.items():
        while idle:
            decoder = ReusedDecoder(program=program, threads=threads)
            decoder.start()
            decoder._kill()
