"""The command ``wan-infer``. Imports no torch until there is something to sample, so that ``--help`` is immediate."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from wan_infer import __version__
from wan_infer.flags import SeveralValues, flag
from wan_infer.requests import (
    NEGATIVE_PROMPT,
    SOLVERS,
    TASK_SIZES,
    Settings,
    SolverName,
    check_task,
    pair_requests,
)


@click.command(cls=SeveralValues, context_settings={"show_default": True, "max_content_width": 110})
@flag("prompts", multiple=True, required=True, help="What the video shows; several make several videos.")
@flag("model", help="Folder in diffusers' layout, or hub id: text encoder, autoencoder, and, without --checkpoint-dir, "
      "the transformer.")  # fmt: skip
@flag("revision", help="The hub id's revision.")
@flag("checkpoint-dir", help="Checkpoint folder of a training run to take the transformer from.")
@flag("checkpoint-step", type=int, help="Which checkpoint of it.  [default: the newest complete one]")
@flag("t5-checkpoint-dir", help="Another model to take text_encoder and tokenizer from.")
@flag("vae-checkpoint-dir", help="Another model to take vae from.")
@flag("task", type=click.Choice(list(TASK_SIZES)), help="Insist on this released model's shape and sizes.")
@flag("sizes", multiple=True, default=["832*480"], help="width*height, for all prompts or one each.")
@flag("frame-nums", multiple=True, type=int, default=[81], help="Frames, 4n+1, for all or one each; 1 makes a PNG.")
@flag("base-seed", multiple=True, type=int, default=[0], help="Seed of the noise, for all or one each.")
@flag("negative-prompt", default=NEGATIVE_PROMPT, show_default="the official one", help="What to keep away from.")
@flag("sample-solver", type=click.Choice(SOLVERS), default="unipc", help="How to walk from noise to video.")
@flag("sample-steps", type=int, default=50, help="Steps of the walk.")
@flag("sample-shift", type=float, default=5.0, help="Shift of the noise levels; 3 suits 480p, 5 suits 720p.")
@flag("sample-guide-scale", type=float, default=5.0, help="Guidance; 1 is none and takes half the time.")
@flag("fps", type=click.IntRange(1, 240), default=16, help="Frames a second of the file; the models were made for 16.")
@flag("device", default="auto", help="auto, cpu, cuda or cuda:N.")
@flag("dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto",
      help="Precision of transformer and text encoder; auto is bfloat16 on CUDA.")  # fmt: skip
@flag("t5-cpu", is_flag=True, help="Embed prompts on the CPU.")
@flag("offload-model", type=bool, default=False, help="Have each part on the device only while it works (true/false).")
@flag("save-file", type=click.Path(path_type=Path), help="Where to write, for one video.")
@flag("output-folder", type=click.Path(path_type=Path), default="videos",
      help="Where to write several; names come from place and digest, never from a prompt.")  # fmt: skip
@flag("contact-sheet", type=click.Path(path_type=Path), help="Also write a PNG with frames of all videos.")
@flag("no-metadata", is_flag=True, help="Keep prompt, seed, settings and versions out of the files.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
@click.version_option(__version__, prog_name="wan-infer")
def main(
    prompts: tuple[str, ...],
    model: str | None,
    revision: str | None,
    checkpoint_dir: str | None,
    checkpoint_step: int | None,
    t5_checkpoint_dir: str | None,
    vae_checkpoint_dir: str | None,
    task: str | None,
    sizes: tuple[str, ...],
    frame_nums: tuple[int, ...],
    base_seed: tuple[int, ...],
    negative_prompt: str,
    sample_solver: SolverName,
    sample_steps: int,
    sample_shift: float,
    sample_guide_scale: float,
    fps: int,
    device: str,
    dtype: str,
    t5_cpu: bool,
    offload_model: bool,
    save_file: Path | None,
    output_folder: Path,
    contact_sheet: Path | None,
    no_metadata: bool,
    as_json: bool,
) -> None:
    """Sample Wan 2.1 text-to-video: from released weights, or from a training checkpoint.

    \b
    wan-infer --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts "a rabbit in a meadow" --save-file rabbit.mp4
    wan-infer --model FOLDER --checkpoint-dir RUN --checkpoint-step 2000 --prompts "rabbit" "street" --sizes 480*832

    Each flag is understood with hyphens and with underscores.
    """
    try:
        requests = pair_requests(prompts, sizes, frame_nums, base_seed)
        settings = Settings(sample_steps, sample_shift, sample_guide_scale, sample_solver, negative_prompt)
        if task is not None:
            check_task(task, requests)
        if checkpoint_step is not None and checkpoint_dir is None:
            raise ValueError("--checkpoint-step needs --checkpoint-dir, the run's checkpoint folder")
        if checkpoint_dir is None and model is None:
            raise ValueError(
                "there is no transformer to sample: give --model (a folder in diffusers' layout, or a hub id such as "
                "Wan-AI/Wan2.1-T2V-1.3B-Diffusers), or --checkpoint-dir of a training run"
            )
        if model is None and (t5_checkpoint_dir is None or vae_checkpoint_dir is None):
            raise ValueError(
                "a training checkpoint holds the transformer only: give --model for the text encoder and the "
                "autoencoder, or both --t5-checkpoint-dir and --vae-checkpoint-dir"
            )

        from wan_infer.run import Job, check_outputs, run

        job = Job(
            requests=requests,
            settings=settings,
            fps=fps,
            save_file=save_file,
            output_folder=output_folder,
            contact_sheet=contact_sheet,
            metadata=not no_metadata,
        )
        check_outputs(job)
        sources = {
            "model": model,
            "revision": revision,
            "checkpoint_dir": checkpoint_dir,
            "checkpoint_step": checkpoint_step,
            "text_model": t5_checkpoint_dir,
            "vae_model": vae_checkpoint_dir,
        }
        placement = {"device": device, "dtype": dtype, "t5_cpu": t5_cpu, "offload": offload_model}
        report = run(job, sources, placement, task, sys.stderr)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    _show(report, as_json=as_json)


def _show(report: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(report, ensure_ascii=False, indent=2))
        return
    for video in report["videos"]:
        click.echo(video["file"])
    seconds = report["seconds"]
    spent = ", ".join(f"{stage} {seconds[stage]:.1f}" for stage in ("load", "text", "denoise", "decode", "write"))
    count = len(report["videos"])
    click.echo(f"{count} video{'s' if count > 1 else ''} in {seconds['total']:.1f} s ({spent})")
