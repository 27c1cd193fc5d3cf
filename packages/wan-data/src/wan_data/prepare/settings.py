"""What ``wan-data prepare`` is told, checked in one place."""

import dataclasses
from fractions import Fraction
from typing import Any

from wan_data.video.buckets import Size, buckets_of_area, check_side
from wan_data.video.limits import Caps
from wan_data.video.windows import TEMPORAL_STRIDE, WINDOW_KINDS, Lengths, trim

DEFAULT_AREA = 480 * 832
DEFAULT_FRAMES = 81
MODES = ("video", "frames")
RESIZE_MODES = ("bicubic", "bilinear", "nearest")
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class PrepareSettings:
    """Everything that decides the bytes of the shards, besides the input and the model.

    Attributes:
        mode: ``video``, or ``frames`` for single images out of videos and image files.
        fps: target rate; exact, so that ``24000/1001`` is possible.
        windows: ``whole``, ``first`` or ``consecutive`` (see ``windows.plan_windows``).
        frames: most frames of a window, 4n+1.
        min_frames: fewest frames of a window, 4n+1.
        lengths: the only numbers of frames that windows may have, 4n+1 each; instead of the two above.
        areas: pixels that the aspect buckets aim at, one set of buckets each; a source goes to the largest area that
            it fills. Ignored with a fixed size.
        height, width: one fixed size instead of buckets; both or neither.
        resize_mode: ``bicubic``, ``bilinear`` or ``nearest``.
        center_crop: keep the aspect ratio and cut the margins; otherwise stretch.
        allow_upscaling: take sources that are smaller than their bucket.
        caption_key: the key of captions in their files.
        max_source_frames, max_source_pixels, max_source_bytes: what is read of a source at most (see ``caps.Caps``).
        batch_size: windows of one shape that are encoded together; their values depend on it in the last digits.
        samples_per_shard: samples of a full shard.
        validation_fraction: share of the sources whose samples go to the ``val`` split.
        dtype: what the encoders compute in; latents and text are stored as float32.
        text_length: tokens that captions are cut to.
        seed: of the choice of validation sources.
    """

    mode: str = "video"
    fps: Fraction = Fraction(16)
    windows: str = "consecutive"
    frames: int = DEFAULT_FRAMES
    min_frames: int = 17
    lengths: tuple[int, ...] | None = None
    areas: tuple[int, ...] = (DEFAULT_AREA,)
    height: int | None = None
    width: int | None = None
    resize_mode: str = "bicubic"
    center_crop: bool = True
    allow_upscaling: bool = False
    caption_key: str = "caption"
    max_source_frames: int = Caps.frames
    max_source_pixels: int = Caps.pixels
    max_source_bytes: int = Caps.bytes
    batch_size: int = 1
    samples_per_shard: int = 100
    validation_fraction: float = 0.05
    dtype: str = "float32"
    text_length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("mode", self.mode, MODES),
            ("windows", self.windows, WINDOW_KINDS),
            ("resize_mode", self.resize_mode, RESIZE_MODES),
            ("dtype", self.dtype, DTYPES),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}")
        if self.lengths is not None and not self.lengths:
            raise ValueError("lengths holds none; name at least one length of a window, or leave it out")
        for name, frames in (
            ("frames", self.frames),
            ("min_frames", self.min_frames),
            *(("length", length) for length in self.lengths or ()),
        ):
            if frames < 1 or trim(frames) != frames:
                lower = max(1, trim(frames))
                raise ValueError(
                    f"{name} is {frames}; the autoencoder takes 4n+1 frames: "
                    f"the nearest are {lower} and {lower + TEMPORAL_STRIDE}"
                )
        if self.min_frames > self.frames:
            raise ValueError(
                f"min_frames is {self.min_frames}, more than the longest window of {self.frames}; lower it"
            )
        if self.fps <= 0:
            raise ValueError(f"fps is {self.fps}; it must be positive")
        if (self.height is None) != (self.width is None):
            raise ValueError("height and width go together: give both for one fixed size, or neither for buckets")
        if self.height is not None and self.width is not None:
            check_side("height", self.height)
            check_side("width", self.width)
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction is {self.validation_fraction}; it must be at least 0 and below 1")
        for name in ("samples_per_shard", "text_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.areas:
            raise ValueError("areas holds none; name at least one")
        self.resolutions()
        _ = self.caps

    @property
    def caps(self) -> Caps:
        """What is read of a source at most."""
        return Caps(self.max_source_frames, self.max_source_pixels, self.max_source_bytes)

    @property
    def window_lengths(self) -> Lengths:
        """Frames that a sample may have."""
        if self.mode == "frames":
            return Lengths(1, 1)
        if self.lengths is not None:
            only = tuple(sorted(set(self.lengths)))
            return Lengths(only[0], only[-1], only)
        return Lengths(self.min_frames, self.frames)

    def resolutions(self) -> tuple[tuple[Size, ...], ...]:
        """The sizes that sources are resized to: the buckets of each resolution, smallest first."""
        if self.height is not None and self.width is not None:
            return ((Size(self.height, self.width),),)
        return tuple(buckets_of_area(area) for area in sorted(set(self.areas)))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values for the manifest."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in ({**dataclasses.asdict(self), "fps": str(self.fps)}).items()
        }
