"""Reading video files with FFmpeg: the stream that a player shows, its times, and whether anything is missing."""

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, BinaryIO

import av
from av.stream import Disposition

from wan_data.video.containers.ffv1 import SliceChecksums
from wan_data.video.containers.timing import Clock
from wan_data.video.containers.transport_stream import CounterBreak, counter_breaks
from wan_data.video.containers.truncation import missing_end
from wan_data.video.display.colours import check_colours, colours_of_frame, quick_rgb_of_frame, rgb_of_frame
from wan_data.video.display.options import DisplayOptions
from wan_data.video.display.picture import Orientation, Picture, orientation_of_frame, picture_of
from wan_data.video.limits import Limits
from wan_data.video.source_file import Rejected, check_pixels, open_container
from wan_data.video.windows import TimedFrame

# Width over height of a pixel, or the inverse; the widest formats in use have 2.2.
_LARGEST_ASPECT = 16


class VideoReader:
    """One pass over a video file.

    Args:
        file: of ``wan_data.video.source_file.open_source``.
        limits: of the source.
        display: the background of transparent pixels, and what becomes of HDR.
        on_frame: called after each decoded frame with the number of frames so far.

    Attributes:
        decoded: number of frames so far.
        fps: average frame rate; 0 if the file states none.
        orientation: of the display, from the first frame on.
    """

    def __init__(
        self, file: BinaryIO, limits: Limits, display: DisplayOptions, on_frame: Callable[[int], None]
    ) -> None:
        self._file, self._limits, self._display, self._on_frame = file, limits, display, on_frame
        self.decoded = 0
        self.fps = 0.0
        self.orientation = Orientation()
        self._pixel_aspect = Fraction(1)
        self._frame_aspect: Fraction | None = None  # as the codec states it
        self._size: tuple[int, int] | None = None
        self._breaks: list[CounterBreak] = []  # of a transport stream
        self._position = 0  # of the packet before

    def frames(self) -> Iterator[TimedFrame[Picture]]:
        """The frames in order of presentation.

        Raises:
            Rejected: the file cannot be decoded completely, or exceeds a limit.
        """
        try:
            with open_container(self._file) as container:
                yield from self._frames(container)
        except av.error.FFmpegError as error:
            raise Rejected(f"it cannot be decoded: {error.strerror or error}") from None
        if not self.decoded:
            raise Rejected("no frame could be decoded from it")

    def _frames(self, container: Any) -> Iterator[TimedFrame[Picture]]:
        stream, demuxer = _shown_stream(container), container.format.name.partition(",")[0]
        if stream.sample_aspect_ratio:
            self._pixel_aspect = Fraction(stream.sample_aspect_ratio)
        if not 1 / _LARGEST_ASPECT <= self._pixel_aspect <= _LARGEST_ASPECT:
            raise Rejected(
                f"its pixels are {self._pixel_aspect} times as wide as high; at most {_LARGEST_ASPECT} times, or a "
                f"{_LARGEST_ASPECT}th, is read"
            )
        if stream.average_rate:
            self.fps = float(stream.average_rate)
        decode = _decoder(stream)
        clock = Clock(demuxer, stream.time_base)
        discarded = 0
        if demuxer == "mpegts":
            self._find_breaks(stream.id)
        if (reason := missing_end(demuxer, self._file.fileno())) is not None:
            raise Rejected(reason)
        checksums = SliceChecksums() if stream.codec_context.name == "ffv1" else None
        for packet in container.demux(stream):
            discarded += packet.is_discard
            damaged = checksums is not None and packet.size > 0 and not checksums.are_right(bytes(packet))
            if damaged or (packet.is_corrupt and not self._breaks):
                raise Rejected(f"its data are damaged after frame {self.decoded}")
            if not clock.adjust(packet) and self._follows_break(packet.pos):
                raise Rejected(f"its data are damaged after frame {self.decoded}: frames are missing")
            self._position = packet.pos or self._position
            for frame in decode(packet):
                yield self._timed(frame, stream, clock)
        self._check_complete(stream, demuxer, discarded)

    def _find_breaks(self, pid: int) -> None:
        # FFmpeg notes a break beside the access unit before, and loses the note at the first one.
        self._breaks = counter_breaks(self._file.fileno(), pid)
        for one in self._breaks:
            if not one.clean:
                raise Rejected(
                    f"its data are damaged: packets of its transport stream are missing at byte {one.position}"
                )

    def _follows_break(self, position: int | None) -> bool:
        """The counter breaks between the access unit before and this one."""
        return any(self._position < one.position <= (position or 0) for one in self._breaks)

    def _timed(self, frame: Any, stream: Any, clock: Clock) -> TimedFrame[Picture]:
        if frame.is_corrupt:
            raise Rejected(f"its frame {self.decoded} is damaged")
        check_pixels(frame.width, frame.height, self._limits)
        if self.decoded == self._limits.frames:
            raise Rejected(
                f"it has more than the {self._limits.frames} frames that are read at most (--max-source-frames)"
            )
        colours = colours_of_frame(frame, stream.codec_context)
        check_colours(frame, colours, self._display)
        orientation = orientation_of_frame(frame)
        aspect = Fraction(stream.codec_context.sample_aspect_ratio or 1)  # PyAV does not give that of the frame
        if self._size is None:
            self._size, self.orientation = (frame.width, frame.height), orientation
        elif (frame.width, frame.height) != self._size:
            raise Rejected(
                f"its size changes at frame {self.decoded} from {self._size[0]} x {self._size[1]} "
                f"to {frame.width} x {frame.height}"
            )
        elif orientation != self.orientation:
            raise Rejected(f"its orientation changes at frame {self.decoded}")
        if self._frame_aspect is None:
            self._frame_aspect = aspect
        elif aspect != self._frame_aspect:
            raise Rejected(
                f"the shape of its pixels changes at frame {self.decoded} from {self._frame_aspect} to {aspect}"
            )
        time, duration = clock.time(frame, frame.time_base or stream.time_base)
        self.decoded += 1
        self._on_frame(self.decoded)
        picture = picture_of(
            lambda: rgb_of_frame(frame, colours, self._display),
            frame.height,
            frame.width,
            orientation,
            self._pixel_aspect,
            lambda: quick_rgb_of_frame(frame, colours, self._display),
        )
        return TimedFrame(time, duration, picture)

    def _check_complete(self, stream: Any, demuxer: str, discarded: int) -> None:
        """Compare the number of frames with that of the header."""
        declared = stream.frames
        if self.decoded >= declared - discarded:
            return
        index = list(stream.index_entries)
        shown = sum(not entry.is_discard and entry.size > 0 for entry in index)
        if demuxer == "avi" and index and index[-1].timestamp + 1 >= declared and self.decoded >= shown:
            return  # the others are empty chunks: the frame before is displayed longer
        if demuxer == "mov" and self.decoded >= shown and self._frames_before_edits(stream.index) >= declared:
            return  # the others are not displayed by the edit list
        raise Rejected(f"only {self.decoded} of the {declared} frames that its header declares can be decoded")

    def _frames_before_edits(self, number: int) -> int:
        with open_container(self._file, {"ignore_editlist": "1"}) as container:
            return len(container.streams[number].index_entries)


def _shown_stream(container: Any) -> Any:
    """The stream that FFmpeg's command would choose: no cover, by preference the default one, then the largest."""

    def preference(stream: Any) -> tuple[bool, int]:
        codec = stream.codec_context
        default = bool(stream.disposition & Disposition.default)
        return not stream.disposition & Disposition.attached_pic, codec.width * codec.height + 5_000_000 * default

    if not container.streams.video:
        raise Rejected("it has no video stream")
    known = [stream for stream in container.streams.video if stream.codec_context is not None]
    if not known:
        raise Rejected("it cannot be decoded: FFmpeg has no decoder for its video")
    return max(known, key=preference)


def _decoder(stream: Any) -> Callable[[Any], list[Any]]:
    """The function that decodes a stream's packets."""
    codec = stream.codec_context
    if codec.codec.intra_only or codec.name in ("ffv1", "png"):
        # Decoders of single pictures fill a damaged one without a word; where pictures depend on others, strictness
        # would refuse streams that begin or were cut between key frames.
        codec.options = {"err_detect": "crccheck+explode"}
    if stream.metadata.get("alpha_mode") == "1" and codec.name in ("vp8", "vp9"):
        # Transparency is a second stream, which FFmpeg's own decoders leave out.
        with_alpha: Any = av.CodecContext.create(f"libvpx-{codec.name}" if codec.name == "vp9" else "libvpx", "r")
        with_alpha.extradata = codec.extradata
        return lambda packet: list(with_alpha.decode(packet))
    return lambda packet: list(packet.decode())
