"""The settings of ``wan-data prepare``, validated in one place."""

import dataclasses
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from wan_data.curation.expressions import Where, compile_where
from wan_data.curation.measures import MEASURES_VERSION, SCENE_KINDS
from wan_data.video.buckets import Size, buckets_of_area
from wan_data.video.display.options import DisplayOptions
from wan_data.video.limits import READING_VERSION, Limits
from wan_data.video.windows import WINDOW_KINDS, Lengths
from wan_model.config import OFFICIAL_TEXT_LENGTH
from wan_model.precision import VAE_PRECISIONS
from wan_model.video_shape import check_frames, check_side

DEFAULT_AREA = 480 * 832
DEFAULT_FRAMES = 81
MODES = ("video", "frames")
RESIZE_MODES = ("bicubic", "bilinear", "nearest")
DTYPES = tuple(VAE_PRECISIONS)
DUPLICATES = ("keep", "name", "drop")
# Columns of --where that are known without measuring.
_UNMEASURED = {"seconds", "frames", "fps", "height", "width", "bytes", "samples"}


@dataclasses.dataclass(frozen=True)
class PrepareSettings:
    """The settings that determine the bytes of the shards, together with the sources and the model.

    Attributes:
        mode: ``video``, or ``frames`` for single images from videos and image files.
        fps: target rate; a fraction, so that ``24000/1001`` is exact.
        windows: ``whole``, ``first`` or ``consecutive`` (see ``wan_data.video.windows.plan_windows``).
        frames: largest number of frames of a window, 4n+1.
        min_frames: smallest number of frames of a window, 4n+1.
        lengths: allowed numbers of frames of a window, 4n+1 each; replaces ``frames`` and ``min_frames``.
        areas: target pixels of the aspect buckets, one set of buckets for each area. A source uses the largest area
            that it fills. Ignored with a fixed size.
        height, width: one fixed size instead of buckets; both or neither.
        resize_mode: ``bicubic``, ``bilinear`` or ``nearest``.
        center_crop: keep the aspect ratio and crop the margins; otherwise stretch.
        allow_upscaling: accept sources that are smaller than their bucket.
        caption_key: key of the caption in JSON files and listings.
        background, hdr: how sources are displayed (see ``wan_data.video.display.options.DisplayOptions``).
        max_source_frames, max_source_pixels, max_source_bytes, max_source_still: limits of an accepted source (see
            ``wan_data.video.limits.Limits``).
        batch_size: number of windows of one shape that are encoded together; it changes the last digits of latents.
        samples_per_shard: samples of a full shard.
        validation_fraction: share of the sources whose samples go to the ``val`` split.
        dtype: precision of the encoders; ``tf32`` is float32 with convolutions that a GPU may round to TF32. Latents
            and text embeddings are stored as float32.
        text_length: number of tokens that captions are truncated to.
        seed: of the choice of validation sources.
        scenes: ``off``, ``content`` or ``adaptive``: how the cuts are found that no window crosses (see
            ``wan_data.curation.scenes.CutDetector``).
        duplicates: of near-duplicates all are encoded (``keep``, ``name``), or one (``drop``); ``keep`` does not look
            for them, ``name`` records them and keeps them in one split.
        where: an expression that sources fulfil (see ``wan_data.curation.expressions``); None selects all.
        measures: measure all sources, also if nothing above needs it.
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
    background: str = DisplayOptions.background
    hdr: str = DisplayOptions.hdr
    max_source_frames: int = Limits.frames
    max_source_pixels: int = Limits.pixels
    max_source_bytes: int = Limits.bytes
    max_source_still: int = Limits.still
    batch_size: int = 1
    samples_per_shard: int = 100
    validation_fraction: float = 0.05
    dtype: str = "float32"
    text_length: int = OFFICIAL_TEXT_LENGTH
    seed: int = 0
    scenes: str = "off"
    duplicates: str = "keep"
    where: str | None = None
    measures: bool = False

    def __post_init__(self) -> None:
        for name, value, known in (
            ("mode", self.mode, MODES),
            ("windows", self.windows, WINDOW_KINDS),
            ("resize_mode", self.resize_mode, RESIZE_MODES),
            ("dtype", self.dtype, DTYPES),
            ("scenes", self.scenes, SCENE_KINDS),
            ("duplicates", self.duplicates, DUPLICATES),
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
            check_frames(name, frames)
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
        _ = self.limits, self.display, self.selection

    @property
    def images(self) -> bool:
        """Image files are sources, as videos are."""
        return self.mode == "frames"

    @property
    def limits(self) -> Limits:
        """The limits of an accepted source."""
        return Limits(self.max_source_frames, self.max_source_pixels, self.max_source_bytes, self.max_source_still)

    @property
    def display(self) -> DisplayOptions:
        """How sources are displayed."""
        return DisplayOptions(self.background, self.hdr)

    @property
    def selection(self) -> Where | None:
        """The compiled expression of ``where``."""
        return None if self.where is None else compile_where(self.where)

    @property
    def measuring(self) -> bool:
        """Whether sources are measured while they are probed, for which the extra ``curation`` is needed."""
        needed = self.selection is not None and bool(self.selection.columns - _UNMEASURED)
        return self.measures or needed or self.scenes != "off" or self.duplicates != "keep"

    @property
    def window_lengths(self) -> Lengths:
        """The allowed lengths of windows."""
        if self.mode == "frames":
            return Lengths(1, 1)
        if self.lengths is not None:
            only = tuple(sorted(set(self.lengths)))
            return Lengths(only[0], only[-1], only)
        return Lengths(self.min_frames, self.frames)

    def resolutions(self) -> tuple[tuple[Size, ...], ...]:
        """The sizes that sources are resized to: the buckets of each area, smallest first."""
        if self.height is not None and self.width is not None:
            return ((Size(self.height, self.width),),)
        return tuple(buckets_of_area(area) for area in sorted(set(self.areas)))

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values, as the manifest holds them, with the version of how sources are read."""
        values = {**dataclasses.asdict(self), "fps": str(self.fps), "reading_version": READING_VERSION}
        values["measures_version"] = MEASURES_VERSION if self.measuring else None
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def require_same_settings(stored: Mapping[str, Any], settings: PrepareSettings, name: str) -> None:
    """Refuse to add samples of other settings to a dataset.

    Args:
        stored: the settings in its manifest, as ``to_dict`` gives them.
        settings: those of this preparation.
        name: of the dataset, for the message.

    Raises:
        ValueError: they differ; the message names the settings.
    """
    wanted = settings.to_dict()
    if stored.get("reading_version") != wanted["reading_version"]:
        raise ValueError(
            f"{name} holds a dataset whose videos were read by another version of wan-data, from which the same file "
            "gets other pixels; choose another folder, or pass --overwrite to replace it"
        )
    # A setting that is newer than the dataset had the value that is its default.
    stored = {**PrepareSettings().to_dict(), **stored}
    if stored["measures_version"] == wanted["measures_version"]:
        wanted["measures"] = stored["measures"]  # what else asks for them does not matter
    if differing := [one for one in sorted(stored) if wanted.get(one) != stored[one]]:
        # Whether there is a version of measures follows from what asks for them.
        given = [one for one in differing if one != "measures_version"] or differing
        shown = ", ".join(f"{one} {_shown(wanted.get(one))} instead of {_shown(stored[one])}" for one in given)
        raise ValueError(
            f"{name} holds a dataset of other settings ({shown}); use the same settings, choose "
            "another folder, or pass --overwrite to replace it"
        )


def _shown(value: Any) -> str:
    """A setting as a user gives it."""
    if value is None:
        return "not given"
    return ("off", "on")[value] if isinstance(value, bool) else repr(value)
