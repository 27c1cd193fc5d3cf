"""The command line ``wan-data``. What is heavy to import is imported when it is needed, so that --help is not."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from wan_data import __version__
from wan_data.cli_options import DEFAULT_MODEL, choices, flag, inputs, sentences, settings_of, sources_of
from wan_data.prepare.preload import warm_up


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="wan-data")
def main() -> None:
    """From videos with captions to shards of Wan 2.1 latents."""


@main.command()
@inputs
@flag("output-folder", "output-dir", required=True, type=click.Path(path_type=Path), help="Where the dataset goes.")
@flag(
    "model",
    default=DEFAULT_MODEL,
    help="Folder in diffusers' layout, or hub id, with the autoencoder and the text encoder.",
)
@choices
@flag("num-processes", default=1, type=int, help="Processes that encode.")
@flag("num-decoders", type=int, help="Processes that examine the clips; one a core if not given.")
@flag("device", default="auto", help="auto, cpu, cuda or cuda:N.")
@flag("output-format", default="energon", type=click.Choice(["energon"]), help="The only one there is.")
@flag("allow-rejects", is_flag=True, help="End with exit code 0 although files were rejected.")
@flag("overwrite", is_flag=True, help="Begin anew in a folder that holds a dataset.")
def prepare(
    video_folder: Path | None,
    listing: Path | None,
    output_folder: Path,
    model: str,
    num_processes: int,
    num_decoders: int | None,
    device: str,
    output_format: str,
    allow_rejects: bool,
    overwrite: bool,
    **choices: Any,
) -> None:
    """Encode a folder of clips with captions beside them into shards and Energon metadata.

    A clip a/clip.mp4 has its caption in a/clip.json ({"caption": "..."}), a/clip.jsonl or a/clip.txt, or in any
    a/*.jsonl with a line that names clip.mp4; or all clips and captions stand in one --listing. Files that cannot be
    used are named with the reason, the others go on, and the exit code is 1 at the end. The same command goes on after
    an interruption, and adds what is new in the folder. Under torchrun all processes work on one dataset.
    """
    del output_format
    with sentences(output_folder):
        from wan_data.progress import SilentReport, make_report

        settings = settings_of(choices)
        sources = sources_of(video_folder, listing, settings)
        if num_processes > 1:
            warm_up()  # while this process imports for itself
        from wan_data.inspect.summary import summary_of
        from wan_data.prepare.ranks import ranks_of_environment
        from wan_data.prepare.run import prepare as run

        ranks = ranks_of_environment()
        with make_report() if ranks.rank == 0 else SilentReport() as report:
            manifest = run(
                sources,
                output_folder,
                model,
                settings,
                report=report,
                overwrite=overwrite,
                device=device,
                processes=num_processes,
                decoders=num_decoders,
                ranks=ranks,
            )
    if ranks.rank == 0:
        for line in summary_of(manifest, output_folder):
            click.echo(line)
    if not allow_rejects and any(source.verdict == "rejected" or source.dropped for source in manifest.sources):
        sys.exit(1)


@main.command()
@inputs
@flag("output-folder", "output-dir", type=click.Path(path_type=Path), help="Keep the examination there, for prepare.")
@flag("model", help="Measure its autoencoder here, to estimate the time.")
@choices
@flag("num-decoders", type=int, help="Processes that examine the clips; one a core if not given.")
@flag("device", default="auto", help="auto, cpu, cuda or cuda:N; what is measured.")
@flag("allow-rejects", is_flag=True, help="End with exit code 0 although files would be rejected.")
@flag("json", "as-json", is_flag=True, help="Print one JSON object instead of tables.")
def plan(
    video_folder: Path | None,
    listing: Path | None,
    output_folder: Path | None,
    model: str | None,
    num_decoders: int | None,
    device: str,
    allow_rejects: bool,
    **choices: Any,
) -> None:
    """Say what prepare would make of the clips, and what it would reject and why, without encoding anything.

    Takes the options of prepare. Every clip is decoded to its end; with --output-folder prepare need not do it again.
    """
    as_json = choices.pop("json")
    with sentences(output_folder or Path()):
        from wan_data.prepare.plan import make_plan, measured_rate, print_plan
        from wan_data.prepare.run import examine_only
        from wan_data.progress import make_report

        settings = settings_of(choices)
        sources = sources_of(video_folder, listing, settings)
        with make_report() as report:
            verdicts = examine_only(sources, settings, report=report, decoders=num_decoders, output=output_folder)
            rate = None
            if model is not None:
                report.say(f"measuring {model}")
                rate = measured_rate(model, settings, device)
        found = make_plan(verdicts, settings, rate=rate)
    if as_json:
        click.echo(json.dumps(found, indent=1, sort_keys=True))
    else:
        print_plan(found)
    if found["rejected"] and not allow_rejects:
        sys.exit(1)


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@flag("capacity", type=int, help="Tokens of a pack; the largest sample's if not given.")
@flag("pad-multiple", default=1, type=int, help="Packs are padded to a multiple of this many tokens.")
@flag("packing-buffer", default=64, type=int, help="Samples looked at together when packing.")
@flag("png", type=click.Path(path_type=Path), help="Draw the sizes and the packing into this file.")
@flag("json", "as-json", is_flag=True, help="Print one JSON object instead of tables.")
def inspect(
    path: Path, capacity: int | None, pad_multiple: int, packing_buffer: int, png: Path | None, **choices: bool
) -> None:
    """Say what a dataset, or a blend of several, holds: samples, shapes, tokens, captions, and how well they pack."""
    from wan_data.inspect.statistics import inspect as look
    from wan_data.inspect.statistics import print_tables

    with sentences(path):
        found = look(path, capacity=capacity, pad_multiple=pad_multiple, packing_buffer=packing_buffer)
        if png is not None:
            from wan_data.inspect.plots import charts

            charts(found, png, pad_multiple=pad_multiple, packing_buffer=packing_buffer)
    if choices["json"]:
        click.echo(json.dumps(found, indent=1, sort_keys=True))
    else:
        print_tables(found)


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@flag("sources", type=click.Path(path_type=Path), help="The folder it was made from: compare its files' digests too.")
def verify(path: Path, sources: Path | None) -> None:
    """Check a dataset to the last byte: digests, every member and value, counts, metadata. Exit code 1 if not whole."""
    from wan_data.inspect.verify import verify as check

    with sentences(path):
        checked, problems = check(path, sources=sources, step=lambda name: click.echo(f"read {name}", err=True))
    for problem in problems:
        click.echo(problem)
    counts = ", ".join(f"{count} {kind}" for kind, count in checked.items()) or "nothing"
    click.echo(f"{counts} checked: {f'{len(problems)} problems' if problems else 'all is well'}")
    if problems:
        sys.exit(1)


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@flag("model", default=DEFAULT_MODEL, help="Folder in diffusers' layout, or hub id, with the autoencoder.")
@flag("output", default="preview.png", type=click.Path(path_type=Path), help="The PNG.")
@flag("samples", default=8, type=int, help="How many.")
@flag("split", default="train", help="Of which split.")
@flag("seed", default=0, type=int, help="Which ones.")
@flag("device", default="auto", help="auto, cpu, cuda or cuda:N.")
def preview(path: Path, model: str, output: Path, samples: int, split: str, seed: int, device: str) -> None:
    """Decode some latents and draw their frames over their captions: what training will see."""
    with sentences(path):
        from wan_data.inspect.plots import choose_samples, contact_sheet
        from wan_data.prepare.encoding import choose_device
        from wan_model.codec.latent_codec import LatentCodec

        if samples < 1:
            raise ValueError(f"{samples} samples cannot be shown; it must be at least 1")
        chosen = choose_samples(path, split, samples, seed)
        codec = LatentCodec.from_pretrained(model, load_text=False, device=choose_device(device))
        contact_sheet(chosen, codec, output)
    click.echo(f"{len(chosen)} samples of {path}: {output}")
