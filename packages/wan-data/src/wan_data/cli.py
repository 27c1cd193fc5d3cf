"""The command line ``wan-data``. Heavy modules are imported inside the commands, so that ``--help`` is fast."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import click

from wan_data import __version__
from wan_data.cli_options import (
    DEFAULT_MODEL,
    errors_as_messages,
    flag,
    input_options,
    resumable,
    settings_of,
    settings_options,
    sources_of,
    workers_on,
)
from wan_data.cli_types import LocalPathType, LocationType, OutputFileType
from wan_data.prepare.encoding.preload import preload_encoders
from wan_data.storage.location import Location
from wan_model.system.standard_streams import CheckedCommand

_PIPE_WIDTH = 400
# Clips of one message.
_NAMED = 10


class _Commands(CheckedCommand, click.Group):
    """A group whose commands end with a sentence at errors of the system, such as a full disk."""


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="wan-data")
def main() -> None:
    """From videos with captions to shards of Wan 2.1 latents."""


@main.command()
@input_options
@flag(
    "output-folder",
    "output-dir",
    required=True,
    type=LocationType(),
    help="Folder of the dataset, or URL of one in a store.",
)
@flag(
    "model",
    default=DEFAULT_MODEL,
    help="Folder in diffusers' layout, or hub id, with the autoencoder and the text encoder.",
)
@settings_options
@flag("num-processes", type=int, help="Encoding processes; one per GPU if not given, one without a GPU.")
@flag("num-decoders", type=int, help="Decoder processes that probe the clips; one per core if not given.")
@flag("device", default="auto", help="auto, cpu, cuda or cuda:N.")
@flag("on", default="local", type=click.Choice(["local", "ray"]), help="Processes of this machine, or a Ray cluster.")
@flag(
    "ray-address",
    help="With --on ray: address of the cluster, or auto; RAY_ADDRESS if not given, else a cluster on this machine.",
)
@flag("output-format", default="energon", type=click.Choice(["energon"]), help="The only format.")
@flag("allow-rejects", is_flag=True, help="Exit with code 0 although files were rejected, or have changed.")
@flag("overwrite", is_flag=True, help="Replace a dataset in the output folder.")
@flag("update", is_flag=True, help="Encode changed files again, and remove the samples that they had.")
@flag("remove-missing", is_flag=True, help="Remove the samples of files that are not there any more.")
def prepare(
    video_folder: Location | None,
    listing: Location | None,
    local_copies: int | None,
    work_folder: Path | None,
    output_folder: Location,
    model: str,
    num_processes: int | None,
    num_decoders: int | None,
    device: str,
    on: str,
    ray_address: str | None,
    output_format: str,
    allow_rejects: bool,
    overwrite: bool,
    update: bool,
    remove_missing: bool,
    **values: Any,
) -> None:
    """Encode a folder of clips with captions beside them into shards and Energon metadata.

    A clip a/clip.mp4 has its caption in a/clip.json ({"caption": "..."}), a/clip.jsonl or a/clip.txt, or in any
    a/*.jsonl with a line that names clip.mp4; or one --listing names all clips and captions. Files that cannot be used
    are reported with the reason, the others are encoded, and the exit code is 1 at the end. Run the same command again
    to resume after an interruption, or to add new files; with --update also to encode files again that have changed.
    Under torchrun all processes work on one dataset.
    """
    del output_format
    with errors_as_messages(output_folder):
        from wan_data.progress import SilentReport, make_report

        start_workers = workers_on(on, ray_address, device, num_processes, num_decoders)
        settings = settings_of(values)
        sources, left_out = sources_of(video_folder, listing, settings)
        if start_workers is not None:
            num_processes = 1  # of this machine
        elif num_processes is None:
            from wan_data.prepare.encoding.encoder import default_processes

            num_processes = default_processes(device)
        if num_processes > 1:
            preload_encoders()  # while this process imports its own modules
        from wan_data.prepare.ranks import ranks_from_environment
        from wan_data.prepare.results import summary_lines
        from wan_data.prepare.run import prepare as run
        from wan_data.prepare.store_output import output_at

        ranks = ranks_from_environment()
        with resumable(), make_report() if ranks.rank == 0 else SilentReport() as report:
            result = run(
                sources,
                output_folder,
                model,
                settings,
                report=report,
                overwrite=overwrite,
                update=update,
                remove_missing=remove_missing,
                device=device,
                processes=num_processes,
                decoders=num_decoders,
                ranks=ranks,
                start_workers=start_workers,
                local_copies=local_copies,
                work_folder=work_folder,
            )
    if ranks.rank != 0:
        return  # torchrun ends all ranks when one exits with a failure, and the first has to say what
    made_in = output_at(output_folder, work_folder).folder
    for line in (*summary_lines(result, made_in, str(output_folder)), *left_out()):
        click.echo(line)
    counts = result.manifest.index.counts
    incomplete = counts.rejected or counts.dropped
    if not allow_rejects and (incomplete or result.changed or result.kept):
        sys.exit(1)


@main.command()
@input_options
@flag("output-folder", "output-dir", type=LocationType(), help="Cache the probe results there, for prepare.")
@flag("model", help="Measure its autoencoder on this machine, to estimate the time.")
@settings_options
@flag("num-decoders", type=int, help="Decoder processes that probe the clips; one per core if not given.")
@flag("device", default="auto", help="auto, cpu, cuda or cuda:N; the device that is measured.")
@flag("allow-rejects", is_flag=True, help="Exit with code 0 although files would be rejected.")
@flag("json", "as-json", is_flag=True, help="Print one JSON object instead of tables.")
def plan(
    video_folder: Location | None,
    listing: Location | None,
    local_copies: int | None,
    work_folder: Path | None,
    output_folder: Location | None,
    model: str | None,
    num_decoders: int | None,
    device: str,
    allow_rejects: bool,
    **values: Any,
) -> None:
    """Show the samples that prepare would make of the clips, and the clips it would reject, without encoding.

    Takes the options of prepare. Every clip is decoded to its end; with --output-folder prepare does not repeat that.
    """
    as_json = values.pop("json")
    with errors_as_messages(output_folder or Path()):
        from wan_data.prepare.plan import make_plan, measured_rate, print_plan, refusal_of
        from wan_data.prepare.probing.stage import probe_only
        from wan_data.prepare.ranks import Ranks
        from wan_data.prepare.store_output import output_at
        from wan_data.progress import make_report
        from wan_data.storage.local_copies import LocalCopies

        settings = settings_of(values)
        sources, left_out = sources_of(video_folder, listing, settings)
        output = None if output_folder is None else output_at(output_folder, work_folder)
        with (
            make_report() as report,
            contextlib.nullcontext() if output is None else output.opened(Ranks()),
            LocalCopies(local_copies, folder=work_folder) as copies,
            probe_only(
                sources,
                settings,
                report=report,
                decoders=num_decoders,
                output=None if output is None else output.folder,
                copies=copies,
            ) as results,
        ):
            rate = None
            if model is not None:
                report.log(f"measuring {model}")
                rate = measured_rate(model, settings, device)
            found = {**make_plan(results, settings, rate=rate), "left_out": left_out()}
            refusal = None if output is None else refusal_of(output.folder, settings, str(output_folder))
    if as_json:
        click.echo(json.dumps(found, indent=1, sort_keys=True))
    else:
        print_plan(found)
        for line in found["left_out"]:
            click.echo(line)
    if refusal is not None:
        click.echo(f"prepare would refuse these settings: {refusal}", err=True)
    if found["rejected"] and not allow_rejects:
        sys.exit(1)


@main.command()
@click.argument("path", type=LocationType())
@flag("capacity", type=int, help="Tokens of a pack; the largest sample's if not given.")
@flag("pad-multiple", default=1, type=int, help="Packs are padded to a multiple of this many tokens.")
@flag("packing-buffer", default=64, type=int, help="Number of samples that are packed together.")
@flag("png", type=OutputFileType(), help="Plot the sizes and the packing into this file.")
@flag(
    "measures-png",
    type=OutputFileType(),
    help="With --video-folder: a contact sheet of the clips at both ends of each measure.",
)
@flag("video-folder", type=LocationType(), help="Folder of the clips, or its URL, for --measures-png.")
@flag("json", "as-json", is_flag=True, help="Print one JSON object instead of tables.")
def inspect(
    path: Location,
    capacity: int | None,
    pad_multiple: int,
    packing_buffer: int,
    png: Path | None,
    measures_png: Path | None,
    video_folder: Location | None,
    **flags: bool,
) -> None:
    """Show the samples, shapes, tokens, captions, packing and measures of a dataset, or of a blend of several."""
    from wan_data.inspect.statistics import inspect as read_statistics
    from wan_data.inspect.statistics import print_tables

    with errors_as_messages(path):
        found = read_statistics(path, capacity=capacity, pad_multiple=pad_multiple, packing_buffer=packing_buffer)
        if png is not None:
            from wan_data.inspect.plots import plot_statistics

            plot_statistics(found, png, pad_multiple=pad_multiple, packing_buffer=packing_buffer)
        if measures_png is not None:
            if video_folder is None:
                raise ValueError("--measures-png shows frames of the clips; pass their folder as --video-folder")
            from wan_data.inspect.measures_sheet import measures_sheet

            if unread := measures_sheet(path, video_folder, measures_png):
                click.echo(f"clips that could not be read ({len(unread)}): {', '.join(unread[:_NAMED])}", err=True)
    if flags["json"]:
        click.echo(json.dumps(found, indent=1, sort_keys=True))
    else:
        print_tables(found)


@main.command()
@click.argument("path", type=LocationType())
@flag("where", help="Only those that fulfil an expression, such as 'motion > 0.2 and seconds >= 2'.")
@flag("rejected", is_flag=True, help="Only those that were rejected or left out, with the reasons.")
@flag("limit", default=100, type=click.IntRange(min=1), help="Number of sources that are shown at most.")
@flag("json", "as-json", is_flag=True, help="Print a line of JSON for each instead of a table.")
def sources(path: Location, where: str | None, limit: int, **flags: bool) -> None:
    """List the sources of a dataset, with what was measured of them, by name."""
    from itertools import islice

    from wan_data.inspect.measured import json_line, selected_sources, sources_table, unmeasured_columns

    with errors_as_messages(path):
        found = selected_sources(path, where, rejected=flags["rejected"])
        shown, more = list(islice(found, limit)), next(found, None) is not None
        unmeasured = unmeasured_columns(path, where)
    if flags["json"]:
        for record, seconds in shown:
            click.echo(json_line(record, seconds))
    else:
        from rich.console import Console

        console = Console()
        # In a file or a pipe, a path is in one line.
        (console if console.is_terminal else Console(width=_PIPE_WIDTH)).print(sources_table(shown))
    if unmeasured:
        names = " and ".join(unmeasured)
        click.echo(f"no comparison with {names} is true: {path} was prepared without --measures", err=True)
    if more:
        click.echo(f"there are more than {limit}; pass a larger --limit", err=True)


@main.command()
@click.argument("path", type=LocalPathType("copy the dataset to a disk, upgrade it there, and copy it back"))
def upgrade(path: Path) -> None:
    """Turn a dataset that an earlier version has prepared into the format of today; the shards stay as they are.

    Earlier formats are read as they are, but one file of theirs lists all sources and is read whole. prepare does this
    too when it adds to such a dataset.
    """
    from wan_data.index.manifest import FORMAT_VERSION, read_manifest
    from wan_data.prepare.upgrade import upgrade as run
    from wan_data.shards.lock import writer_lock

    with errors_as_messages(path):
        before = read_manifest(path)
        if before.format_version == FORMAT_VERSION:
            click.echo(f"{path} is of format {FORMAT_VERSION} already")
            return
        with writer_lock(path):
            after = run(path, before, lambda name: click.echo(f"read {name}", err=True))
        counts = after.index.counts
    click.echo(f"{path}: {counts.total} sources, {len(after.shards)} shards, now of format {FORMAT_VERSION}")


@main.command()
@click.argument("path", type=LocationType())
@flag("sources", type=click.Path(path_type=Path), help="Folder of the clips: compare their digests and captions too.")
@flag("listing", type=click.Path(path_type=Path), help="With --sources: the listing that has the captions.")
def verify(path: Location, sources: Path | None, listing: Path | None) -> None:
    """Check digests, every sample and value, counts and metadata of a dataset. Exit code 1 if there are problems."""
    from wan_data.inspect.verify import verify as check
    from wan_data.sources.changes import captions_of

    with errors_as_messages(path):
        checked, problems = check(
            path,
            sources=sources,
            caption_of=None if sources is None else captions_of(path, sources, listing),
            step=lambda name: click.echo(f"read {name}", err=True),
        )
    for problem in problems:
        click.echo(problem)
    counts = ", ".join(f"{count} {kind}" for kind, count in checked.items()) or "nothing"
    click.echo(f"{counts} checked: {f'problems: {len(problems)}' if problems else 'no problems'}")
    if problems:
        sys.exit(1)


@main.command()
@click.argument("path", type=LocationType())
@flag("model", default=DEFAULT_MODEL, help="Folder in diffusers' layout, or hub id, with the autoencoder.")
@flag("output", default="preview.png", type=OutputFileType(), help="The PNG.")
@flag("samples", default=8, type=int, help="Number of samples.")
@flag("split", default="train", help="Split of the samples.")
@flag("seed", default=0, type=int, help="Seed of the choice of samples.")
@flag("device", default="auto", help="auto, cpu, cuda or cuda:N.")
def preview(path: Location, model: str, output: Path, samples: int, split: str, seed: int, device: str) -> None:
    """Decode some latents and show their frames above their captions in a contact sheet."""
    with errors_as_messages(path):
        from wan_data.inspect.plots import choose_samples, contact_sheet
        from wan_data.prepare.encoding.encoder import choose_device
        from wan_model.codec.latent_codec import LatentCodec

        if samples < 1:
            raise ValueError(f"{samples} samples cannot be shown; it must be at least 1")
        chosen = choose_samples(path, split, samples, seed)
        codec = LatentCodec.from_pretrained(model, load_text=False, device=choose_device(device))
        contact_sheet(chosen, codec, output)
    click.echo(f"{len(chosen)} samples of {path}: {output}")
