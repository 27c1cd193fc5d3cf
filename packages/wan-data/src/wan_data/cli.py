"""The command line ``wan-data``. What is heavy to import is imported when it is needed, so that --help is not."""

import json
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import click

from wan_data import __version__
from wan_data.settings import DTYPES, MODES, RESIZE_MODES, PrepareSettings
from wan_data.windows import WINDOW_KINDS

_DEFAULT = PrepareSettings()
_Command = TypeVar("_Command", bound=Callable[..., Any])


def _flag(name: str, *more: str, **attributes: Any) -> Callable[[_Command], _Command]:
    """An option under its kebab-case and its snake_case spelling, and under more names of either kind."""
    spellings: list[str] = []
    for one in (name, *more):
        positive, _, negative = one.partition("/")
        for spelling in dict.fromkeys((positive, positive.replace("-", "_"))):
            other = negative if spelling == positive else negative.replace("-", "_")
            spellings.append(f"--{spelling}/--{other}" if negative else f"--{spelling}")
    return click.option(*spellings, name.partition("/")[0].replace("-", "_"), show_default=True, **attributes)


class _FractionType(click.ParamType[Fraction]):
    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Fraction:
        try:
            return Fraction(str(value))
        except (ValueError, ZeroDivisionError):
            self.fail(f"{value!r} is no number such as 16 or 24000/1001", param, ctx)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="wan-data")
def main() -> None:
    """From videos with captions to shards of Wan 2.1 latents."""


@main.command()
@_flag("video-folder", required=True, type=click.Path(path_type=Path), help="Searched with its subfolders.")
@_flag("output-folder", "output-dir", required=True, type=click.Path(path_type=Path), help="Where the dataset goes.")
@_flag(
    "model",
    default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    help="Folder in diffusers' layout, or hub id, with the autoencoder and the text encoder.",
)
@_flag("mode", default=_DEFAULT.mode, type=click.Choice(MODES), help="Videos, or single images of videos and images.")
@_flag("fps", default=str(_DEFAULT.fps), type=_FractionType(), help="Frames a second that clips are resampled to.")
@_flag("windows", default=_DEFAULT.windows, type=click.Choice(WINDOW_KINDS), help="How clips are cut.")
@_flag("frames", default=_DEFAULT.frames, type=int, help="Longest window, 4n+1 frames.")
@_flag("min-frames", default=None, type=int, help="Shortest window, 4n+1 frames.  [default: 17, or --frames if less]")
@_flag("area", default=_DEFAULT.area, type=int, help="Pixels that the aspect buckets aim at.")
@_flag("height", type=int, help="With --width: one fixed size instead of buckets.")
@_flag("width", type=int, help="With --height: one fixed size instead of buckets.")
@_flag("resize-mode", default=_DEFAULT.resize_mode, type=click.Choice(RESIZE_MODES), help="How pixels are resampled.")
@_flag("center-crop/no-center-crop", default=True, help="Cut the margins to keep the aspect ratio, or stretch.")
@_flag("allow-upscaling/no-allow-upscaling", default=False, help="Take clips that are smaller than their bucket.")
@_flag("caption-key", default=_DEFAULT.caption_key, help="Key of the caption in .json and .jsonl files.")
@_flag("samples-per-shard", default=_DEFAULT.samples_per_shard, type=int, help="Samples of a full shard.")
@_flag("validation-fraction", default=_DEFAULT.validation_fraction, type=float, help="Share of clips kept for val.")
@_flag("text-length", default=_DEFAULT.text_length, type=int, help="Tokens that captions are cut to.")
@_flag("dtype", default=_DEFAULT.dtype, type=click.Choice(DTYPES), help="What the encoders compute in.")
@_flag("seed", default=_DEFAULT.seed, type=int, help="Of the choice of validation clips.")
@_flag("num-processes", default=1, type=int, help="Processes that encode.")
@_flag("device", default="auto", help="auto, cpu, cuda or cuda:N.")
@_flag("output-format", default="energon", type=click.Choice(["energon"]), help="The only one there is.")
@_flag("allow-rejects", is_flag=True, help="End with exit code 0 although files were rejected.")
@_flag("overwrite", is_flag=True, help="Replace a dataset in the output folder.")
def prepare(
    video_folder: Path,
    output_folder: Path,
    model: str,
    min_frames: int | None,
    num_processes: int,
    device: str,
    output_format: str,
    allow_rejects: bool,
    overwrite: bool,
    **choices: Any,
) -> None:
    """Encode a folder of clips with captions beside them into shards and Energon metadata.

    A clip a/clip.mp4 has its caption in a/clip.json ({"caption": "..."}), in a/clip.jsonl, or in any a/*.jsonl with a
    line that names clip.mp4. Files that cannot be used are named with the reason, the others go on, and the exit code
    is 1 at the end.
    """
    from wan_data.progress import make_report

    del output_format
    try:
        shortest = min(_DEFAULT.min_frames, choices["frames"]) if min_frames is None else min_frames
        settings = PrepareSettings(min_frames=shortest, **choices)
        with make_report() as report:
            report.say(f"loading {model}")
            from wan_data.prepare import prepare as run
            from wan_data.summary import summary_of

            manifest = run(
                video_folder,
                output_folder,
                model,
                settings,
                report=report,
                overwrite=overwrite,
                device=device,
                processes=num_processes,
            )
    except OSError as error:
        # Disk full and the like: which file and why, without a traceback.
        raise click.ClickException(f"{error.filename or output_folder}: {error.strerror or error}") from error
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    for line in summary_of(manifest, output_folder):
        click.echo(line)
    if any(source.verdict == "rejected" for source in manifest.sources) and not allow_rejects:
        sys.exit(1)


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@_flag("capacity", type=int, help="Tokens of a pack; the largest sample's if not given.")
@_flag("pad-multiple", default=1, type=int, help="Packs are padded to a multiple of this many tokens.")
@_flag("packing-buffer", default=64, type=int, help="Samples looked at together when packing.")
@_flag("json", is_flag=True, help="Print one JSON object instead of tables.")
def inspect(path: Path, capacity: int | None, pad_multiple: int, packing_buffer: int, **choices: bool) -> None:
    """Say what a dataset holds: samples, shapes, tokens, captions, and how well they pack."""
    from wan_data.inspect_dataset import inspect as look
    from wan_data.inspect_dataset import print_tables

    try:
        found = look(path, capacity=capacity, pad_multiple=pad_multiple, packing_buffer=packing_buffer)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    if choices["json"]:
        click.echo(json.dumps(found, indent=1, sort_keys=True))
    else:
        print_tables(found)
