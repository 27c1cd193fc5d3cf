"""The options of the ``wan-data`` commands and their conversion to settings."""

import contextlib
import errno
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import click

from wan_data.cli_types import FractionType, LocalPathType, LocationType, SizeType
from wan_data.curation.measures import SCENE_KINDS
from wan_data.prepare.settings import DTYPES, DUPLICATES, MODES, RESIZE_MODES, PrepareSettings
from wan_data.storage.location import Location, StorePath
from wan_data.video.display.options import HDR_CHOICES
from wan_data.video.windows import WINDOW_KINDS
from wan_model.system.option_names import option_names
from wan_model.system.versions import check_dependencies

if TYPE_CHECKING:
    from wan_data.prepare.workers import StartWorkers
    from wan_data.sources.source import Sources

DEFAULT_MODEL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
_DEFAULT = PrepareSettings()
_GOES_ON = "What is finished is kept, and the same command goes on."
_Command = TypeVar("_Command", bound=Callable[..., Any])


def flag(name: str, *more: str, **attributes: Any) -> Callable[[_Command], _Command]:
    """A click option with the names of ``option_names``, whose default is shown."""
    return click.option(*option_names(name, *more), show_default=True, **attributes)


def settings_of(values: dict[str, Any]) -> PrepareSettings:
    """Convert the values of ``settings_options`` to settings.

    Raises:
        ValueError: a value, or a combination of values, is invalid.
    """
    frames = values["frames"]
    shortest = values["min_frames"]
    lengths, areas = values.pop("length"), values.pop("area")
    min_frames = min(_DEFAULT.min_frames, frames) if shortest is None else shortest
    return PrepareSettings(
        **{**values, "min_frames": min_frames}, lengths=lengths or None, areas=areas or _DEFAULT.areas
    )


def sources_of(
    video_folder: Location | None, listing: Location | None, settings: PrepareSettings
) -> tuple["Sources", Callable[[], list[str]]]:
    """The sources that the options of ``input_options`` name.

    Returns:
        The sources; and a function that says what of the folder is not read, nothing if a listing names the files.

    Raises:
        ValueError: neither a folder nor a listing is given, or it holds no sources.
        OSError: a store cannot be read.
    """
    from wan_data.sources.folder import SourceFolder
    from wan_data.sources.listing import files_of_listing
    from wan_data.sources.store_folder import StoreFolder

    if listing is not None:
        sources = files_of_listing(listing, video_folder, images=settings.images, caption_key=settings.caption_key)
        return sources, list
    if video_folder is None:
        raise ValueError("no input is given: pass --video-folder, or --listing")
    if isinstance(video_folder, StorePath):
        stored = StoreFolder(video_folder, images=settings.images)
        return stored.files(), stored.left_out
    folder = SourceFolder(video_folder, images=settings.images)
    return folder.files(), folder.left_out


def workers_on(
    on: str, ray_address: str | None, device: str, processes: int | None, decoders: int | None
) -> "StartWorkers | None":
    """What ``--on`` names: the workers on a Ray cluster, or None for those of this machine.

    Raises:
        ValueError: Ray is not installed, or the options contradict each other.
    """
    if on == "ray":
        from wan_data.prepare.on_ray.cluster import ray_workers

        return ray_workers(ray_address, device=device, processes=processes, decoders=decoders)
    if ray_address is not None:
        raise ValueError(f"--ray-address {ray_address} is of --on ray; pass both, or neither")
    return None


@contextlib.contextmanager
def errors_as_messages(folder: Location) -> Iterator[None]:
    """Turn expected errors into a message without a traceback; ``folder`` is named if an ``OSError`` names no file.

    The versions of the dependencies are checked first.
    """
    try:
        check_dependencies("wan-data")
        yield
    except OSError as error:
        raise click.ClickException(f"{error.filename or folder}: {error.strerror or error}") from error
    except ValueError as error:
        raise click.ClickException(str(error)) from error


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """Say of an interruption, and of a disk that is full, that the same command goes on."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_GOES_ON) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(f"{error.filename}: {error.strerror}. Make room on the disk. {_GOES_ON}") from error


def _all(*flags: Callable[[_Command], _Command]) -> Callable[[_Command], _Command]:
    def decorate(command: _Command) -> _Command:
        for flag in reversed(flags):
            command = flag(command)
        return command

    return decorate


input_options = _all(
    flag(
        "video-folder",
        type=LocationType(),
        help="Folder with the clips, or URL of one in a store; subfolders are included.",
    ),
    flag(
        "listing",
        "manifest",
        type=LocationType(),
        help="A .jsonl, .csv or .parquet with paths (relative to --video-folder, or to itself) or URLs, and captions.",
    ),
    flag(
        "local-copies",
        type=SizeType(),
        help="Bytes of the local copies of clips that are in a store.  [default: 20GB, or a tenth of the free disk]",
    ),
    flag(
        "work-folder",
        type=LocalPathType("name a local folder"),
        help="Local folder for these copies and for the state of a dataset in a store.",
    ),
)

settings_options = _all(
    flag(
        "mode",
        default=_DEFAULT.mode,
        type=click.Choice(MODES),
        help="Videos, or single images from videos and image files.",
    ),
    flag("fps", default=str(_DEFAULT.fps), type=FractionType(), help="Frames a second that clips are resampled to."),
    flag("windows", default=_DEFAULT.windows, type=click.Choice(WINDOW_KINDS), help="How clips are cut into windows."),
    flag("frames", default=_DEFAULT.frames, type=int, help="Longest window, 4n+1 frames."),
    flag("min-frames", type=int, help="Shortest window, 4n+1 frames.  [default: 17, or --frames if less]"),
    flag("length", type=int, multiple=True, help="Only windows of this length, 4n+1; may be repeated."),
    flag(
        "area",
        type=int,
        multiple=True,
        help=f"Target pixels of the aspect buckets; may be repeated.  [default: {_DEFAULT.areas[0]}]",
    ),
    flag("height", type=int, help="With --width: one fixed size instead of buckets."),
    flag("width", type=int, help="With --height: one fixed size instead of buckets."),
    flag(
        "resize-mode", default=_DEFAULT.resize_mode, type=click.Choice(RESIZE_MODES), help="How pixels are resampled."
    ),
    flag("center-crop/no-center-crop", default=True, help="Crop the margins to keep the aspect ratio, or stretch."),
    flag("allow-upscaling/no-allow-upscaling", default=False, help="Accept clips that are smaller than their bucket."),
    flag(
        "caption-key", default=_DEFAULT.caption_key, help="Key of the caption in .json and .jsonl files and listings."
    ),
    flag("background", default=_DEFAULT.background, help="Colour behind transparent pixels, as #rrggbb."),
    flag(
        "hdr",
        default=_DEFAULT.hdr,
        type=click.Choice(HDR_CHOICES),
        help="Reject videos in HDR (PQ, HLG), or map their tones to standard dynamic range.",
    ),
    flag("max-source-frames", default=_DEFAULT.max_source_frames, type=int, help="A clip with more is rejected."),
    flag(
        "max-source-pixels", default=_DEFAULT.max_source_pixels, type=int, help="A clip with larger frames is rejected."
    ),
    flag("max-source-bytes", default=_DEFAULT.max_source_bytes, type=int, help="A larger file is rejected."),
    flag(
        "max-source-still",
        default=_DEFAULT.max_source_still,
        type=int,
        help="A clip with a frame that is displayed for more seconds is rejected.",
    ),
    flag("batch-size", default=_DEFAULT.batch_size, type=int, help="Windows of one shape that are encoded together."),
    flag("samples-per-shard", default=_DEFAULT.samples_per_shard, type=int, help="Samples of a full shard."),
    flag("validation-fraction", default=_DEFAULT.validation_fraction, type=float, help="Share of clips kept for val."),
    flag(
        "text-length",
        default=_DEFAULT.text_length,
        type=int,
        help="Tokens that captions are truncated to; a model that is trained on them pads texts to as many.",
    ),
    flag(
        "dtype",
        default=_DEFAULT.dtype,
        type=click.Choice(DTYPES),
        help="Precision of the encoders; tf32 is float32 with convolutions that a GPU may round to TF32.",
    ),
    flag("seed", default=_DEFAULT.seed, type=int, help="Of the choice of validation clips."),
    flag(
        "scenes",
        default=_DEFAULT.scenes,
        type=click.Choice(SCENE_KINDS),
        help="Find the cuts of clips, by which detector of PySceneDetect; no window crosses one.",
    ),
    flag(
        "duplicates",
        default=_DEFAULT.duplicates,
        type=click.Choice(DUPLICATES),
        help="Near-duplicates: not looked for, named and kept in one split, or all but one left out.",
    ),
    flag("where", help="Only clips that fulfil an expression, such as 'motion > 0.2 and seconds >= 2'."),
    flag(
        "measures",
        is_flag=True,
        help="Measure all clips for the index: motion, stillness, sharpness, black borders, fingerprints.",
    ),
)
