"""What ``wan-data prepare`` is told, checked in one place."""

import dataclasses
from fractions import Fraction
from typing import Any

from wan_data.buckets import Size, buckets_of_area, check_side
from wan_data.windows import TEMPORAL_STRIDE, WINDOW_KINDS, trim

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
        area: pixels that the aspect buckets aim at; ignored with a fixed size.
        height, width: one fixed size instead of buckets; both or neither.
        resize_mode: ``bicubic``, ``bilinear`` or ``nearest``.
        center_crop: keep the aspect ratio and cut the margins; otherwise stretch.
        allow_upscaling: take sources that are smaller than their bucket.
        caption_key: the key of captions in their files.
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
    area: int = DEFAULT_AREA
    height: int | None = None
    width: int | None = None
    resize_mode: str = "bicubic"
    center_crop: bool = True
    allow_upscaling: bool = False
    caption_key: str = "caption"
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
        for name, frames in (("frames", self.frames), ("min_frames", self.min_frames)):
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
        for name, count in (("samples_per_shard", self.samples_per_shard), ("text_length", self.text_length)):
            if count < 1:
                raise ValueError(f"{name} is {count}; it must be at least 1")

    @property
    def longest(self) -> int:
        """Most frames of a sample."""
        return 1 if self.mode == "frames" else self.frames

    @property
    def shortest(self) -> int:
        """Fewest frames of a sample."""
        return 1 if self.mode == "frames" else self.min_frames

    def buckets(self) -> tuple[Size, ...]:
        """The sizes that sources are resized to."""
        if self.height is not None and self.width is not None:
            return (Size(self.height, self.width),)
        return buckets_of_area(self.area)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return {**dataclasses.asdict(self), "fps": str(self.fps)}
