"""Presentation times of decoded frames, also of files that have none, or whose times jump."""

from fractions import Fraction
from typing import Any

# Containers whose times may start anew in the middle, where recordings were joined.
_JOINABLE = ("mpegts", "mpeg")
# FFmpeg's command takes a step by more than this for a join, and one back by more than the other (``ts_discontinuity_
# process`` of fftools/ffmpeg_demux.c, version 8).
_LARGEST_STEP = 10
_LARGEST_STEP_BACK = Fraction(1, 10)


class Clock:
    """Times of the frames of one pass over a stream.

    - AVI has no presentation times: a frame is displayed at the decoding time at which it comes out of the decoder,
      as FFmpeg's command has it. Where other containers have only decoding times, these are used too.
    - Transport and program streams may be joined: behind a join the times continue.

    Args:
        demuxer: FFmpeg's name of the container.
        time_base: seconds of a unit of the packets' times.
    """

    def __init__(self, demuxer: str, time_base: Fraction) -> None:
        self._by_decoding = demuxer == "avi"
        self._joinable = demuxer in _JOINABLE
        self._time_base = time_base
        self._offset = 0
        self._expected: int | None = None
        self._last_decoding = 0
        self._next = Fraction(0)

    def adjust(self, packet: Any) -> bool:
        """Move the times of a packet behind those before it if it follows a join.

        Args:
            packet: an ``av.Packet`` that is not decoded yet.

        Returns:
            No frame is missing before it, by its decoding time: it follows at once, or after a join.
        """
        if packet.dts is None:
            return packet.pts is None
        continues = True
        if self._expected is not None:
            step = (packet.dts + self._offset - self._expected) * self._time_base
            back = (self._last_decoding - packet.dts - self._offset) * self._time_base
            if self._joinable and (abs(step) > _LARGEST_STEP or back > _LARGEST_STEP_BACK):
                self._offset += self._expected - (packet.dts + self._offset)
            else:
                continues = abs(step) <= max(packet.duration or 0, 1) * self._time_base / 2
        if self._offset:
            packet.dts += self._offset
            if packet.pts is not None:
                packet.pts += self._offset
        self._last_decoding, self._expected = packet.dts, packet.dts + (packet.duration or 0)
        return continues

    def time(self, frame: Any, time_base: Fraction) -> tuple[Fraction, Fraction]:
        """Presentation time and duration of an ``av.VideoFrame`` in seconds; the duration is 0 if it is unknown."""
        duration = (frame.duration or 0) * time_base
        unit = frame.dts if self._by_decoding or frame.pts is None else frame.pts
        time = self._next if unit is None else unit * time_base
        self._next = time + duration
        return time, duration
