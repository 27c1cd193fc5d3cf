"""The command ``wan-infer``. torch is imported only after the arguments are checked, so that ``--help`` is fast."""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from wan_infer import __version__
from wan_infer.request.flags import ARGUMENTS, SeveralValues, flag
from wan_infer.request.job import Job, check_outputs
from wan_infer.request.options import LORA_MODES, ComputeOptions, ModelSources, ParallelOptions
from wan_infer.request.prompt_file import read_prompt_file
from wan_infer.request.settings import TASK_SIZES, VideoRequest, check_task, pair_requests
from wan_infer.runtime.launch import launch
from wan_model.precision import DTYPES, VAE_PRECISIONS
from wan_model.sampling.settings import NEGATIVE_PROMPT, SOLVERS, Settings
from wan_model.system.child_process import Supervisor, end_process
from wan_model.system.option_types import LocalPath
from wan_model.system.torchrun import rank, world_size
from wan_model.system.versions import check_dependencies


@click.command(
    cls=SeveralValues,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 110},
)
@flag("prompts", multiple=True, help="Text of the video; several make several videos.")
@flag("prompts-file", type=LocalPath(path_type=Path, readable=False),
      help=".txt: one prompt a line; .jsonl: one object a line, which may have settings of its own.")  # fmt: skip
@flag("model", help="Folder in diffusers' layout, or hub id: text encoder, autoencoder, and, without --checkpoint-dir, "
      "the transformer.")  # fmt: skip
@flag("revision", help="The hub id's revision.")
@flag(
    "checkpoint-dir",
    type=LocalPath(readable=False),
    help="Checkpoint folder of a training run to take the transformer from.",
)
@flag("checkpoint-step", type=int, help="Its step.  [default: the newest complete checkpoint]")
@flag("ema", is_flag=True, help="Use the EMA of the checkpoint's weights instead of the weights.")
@flag("lora", multiple=True, type=LocalPath(readable=False),
      help="A LoRA for the transformer: a safetensors file of any trainer, or the checkpoints of a LoRA run; "
      "several are added.")  # fmt: skip
@flag("lora-scale", multiple=True, type=float, show_default="1", help="Scale of the LoRA, for all or one each.")
@flag("lora-mode", type=click.Choice(LORA_MODES), default="merged",
      help="merged: added to the weights when these are loaded; unmerged: computed beside them, so that lines of "
      "--prompts-file may have a lora_scale of their own.")  # fmt: skip
@flag("t5-checkpoint-dir", help="Another model to take text_encoder and tokenizer from.")
@flag("vae-checkpoint-dir", help="Another model to take vae from.")
@flag("task", type=click.Choice(list(TASK_SIZES)), help="Require this released model's shape and sizes.")
@flag("sizes", multiple=True, default=["832*480"], help="width*height, for all prompts or one each.")
@flag("frame-nums", multiple=True, type=int, default=[81], help="Frames, 4n+1, for all or one each; 1 makes a PNG.")
@flag("base-seed", multiple=True, type=int, default=[0], help="Seed of the noise, for all or one each.")
@flag(
    "negative-prompt", default=NEGATIVE_PROMPT, show_default="the official one", help="What the video should not show."
)
@flag("sample-solver", type=click.Choice(SOLVERS), default="unipc", help="Solver of the sampling steps.")
@flag("sample-steps", type=int, default=50, help="Sampling steps.")
@flag("sample-shift", type=float, default=5.0,
      help="Shift of the noise levels; officially 5 at every size, diffusers suggests 3 for 480p.")  # fmt: skip
@flag("sample-guide-scale", type=float, default=5.0, help="Guidance scale; 1 is none and takes half the time.")
@flag("fps", type=click.IntRange(1, 240),
      help="Frames per second; by default those of the checkpoint's data, and 16 for released models.")  # fmt: skip
@flag("device", default="auto", help="auto, cpu, cuda or cuda:N.")
@flag("dtype", type=click.Choice(["auto", *DTYPES]), default="auto",
      help="Precision of transformer and text encoder; auto is bfloat16 on CUDA.")  # fmt: skip
@flag("vae-dtype", type=click.Choice(list(VAE_PRECISIONS)), default="tf32",
      help="Precision of the autoencoder; tf32 is float32 with convolutions that a GPU may round to TF32.")  # fmt: skip
@flag("t5-cpu", is_flag=True, help="Embed prompts on the CPU.")
@flag("offload-model", type=bool, default=False,
      help="Keep each part in main memory, and on the device only while it computes (true/false).")  # fmt: skip
@flag("vae-tiles", type=click.IntRange(1), default=1,
      help="Tiles that every frame is decoded in, for less memory; without seams.")  # fmt: skip
@flag("nproc-per-node", type=click.IntRange(1), default=1,
      help="Processes, each with its own device. They divide the tokens of a video and the tiles of its frames. "
      "Not under torchrun, which starts the processes itself.")  # fmt: skip
@flag("cfg-parallel", is_flag=True, help="Compute the two branches of guidance in one half of the processes each.")
@flag("shard-weights", is_flag=True, help="Shard the transformer's weights over the processes (FSDP).")
@flag("save-file", type=LocalPath(path_type=Path), help="File to write, for one video.")
@flag("output-folder", type=LocalPath(path_type=Path), default="videos",
      help="Folder to write several to; names are made of index and digest, never of a prompt.")  # fmt: skip
@flag("contact-sheet", type=LocalPath(path_type=Path), help="Also write a PNG with frames of all videos.")
@flag("no-metadata", is_flag=True, help="Leave prompt, seed, settings and versions out of the files.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
@click.version_option(__version__, prog_name="wan-infer")
@click.pass_context
def main(context: click.Context, /, nproc_per_node: int, as_json: bool, **given: Any) -> None:
    """Sample Wan 2.1 text-to-video: from released weights, or from a training checkpoint.

    \b
    wan-infer --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompts "a rabbit in a meadow" --save-file rabbit.mp4
    wan-infer --model FOLDER --checkpoint-dir RUN --checkpoint-step 2000 --prompts "rabbit" "street" --sizes 480*832

    Each flag can be written with hyphens or underscores.
    """
    supervisor = Supervisor.find()
    supervisor.follow()
    try:
        if not supervisor.is_launcher:
            check_dependencies("wan-infer")
        requests = _parse_requests(given)
        _check(given, requests, nproc_per_node, launched=supervisor.is_launcher)
        if nproc_per_node > 1 and not supervisor.is_launcher:
            sys.exit(launch(context.meta[ARGUMENTS], nproc_per_node))
        report = _run(given, requests)
        if report is not None:
            _show(report, as_json=as_json)
    except Exception as error:
        if supervisor.is_launcher:
            end_process(supervisor.record(error))
        if isinstance(error, ValueError):
            raise click.ClickException(str(error)) from error
        raise


def _parse_requests(given: dict[str, Any]) -> list[VideoRequest]:
    """One request per video, from the prompts or from a file."""
    file: Path | None = given["prompts_file"]
    if bool(given["prompts"]) == (file is not None):
        if file is None:
            raise ValueError("no prompt is given; give --prompts TEXT, or --prompts-file FILE")
        raise ValueError("both --prompts and --prompts-file are given; give one of them, not both")
    settings = Settings(
        given["sample_steps"],
        given["sample_shift"],
        given["sample_guide_scale"],
        given["sample_solver"],
        given["negative_prompt"],
    )
    requests = pair_requests(
        given["prompts"] or [""], given["sizes"], given["frame_nums"], given["base_seed"], settings
    )
    loras = _pair_loras(given["lora"], given["lora_scale"])
    if given["lora_mode"] == "unmerged":
        if not loras:
            raise ValueError(
                "--lora-mode unmerged needs --lora, the files (or the checkpoints of LoRA runs) that are kept beside "
                "the weights"
            )
        scales = tuple(scale for _, scale in loras)
        requests = [dataclasses.replace(request, lora_scales=scales) for request in requests]
    if file is not None:
        # The values of lines that have none of their own.
        if len(requests) > 1:
            raise ValueError("with --prompts-file give one size, frame count and seed; its lines may have their own")
        requests = read_prompt_file(file, requests[0])
    if given["task"] is not None:
        check_task(given["task"], requests)
    return requests


def _parallel_options(given: dict[str, Any]) -> ParallelOptions:
    return ParallelOptions(cfg_parallel=given["cfg_parallel"], shard_weights=given["shard_weights"])


def _check(given: dict[str, Any], requests: list[VideoRequest], nproc_per_node: int, *, launched: bool) -> None:
    """Check everything that can be checked before loading."""
    model, checkpoint = given["model"], given["checkpoint_dir"]
    for name in ("checkpoint_step", "ema"):
        if given[name] not in (None, False) and checkpoint is None:
            raise ValueError(f"--{name.replace('_', '-')} needs --checkpoint-dir, the run's checkpoint folder")
    if checkpoint is None and model is None:
        raise ValueError(
            "there is no transformer to sample: give --model (a folder in diffusers' layout, or a hub id such as "
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers), or --checkpoint-dir of a training run"
        )
    if model is None and (given["t5_checkpoint_dir"] is None or given["vae_checkpoint_dir"] is None):
        raise ValueError(
            "a training checkpoint holds the transformer only: give --model for the text encoder and the "
            "autoencoder, or both --t5-checkpoint-dir and --vae-checkpoint-dir"
        )
    started = world_size()
    if nproc_per_node > 1 and started > 1 and not launched:
        raise ValueError("--nproc-per-node is given under torchrun, which has started the processes")
    _parallel_options(given).check(max(nproc_per_node, started))
    if given["cfg_parallel"] and any(request.settings.guidance == 1 for request in requests):
        raise ValueError("the guidance scale is 1, so there is no second branch; leave --cfg-parallel out")


def _pair_loras(files: Sequence[str], scales: Sequence[float]) -> list[tuple[str, float]]:
    if scales and not files:
        raise ValueError(
            "--lora-scale needs --lora, which it scales: files, or the checkpoints of LoRA runs (in place of "
            "--checkpoint-dir)"
        )
    if scales and len(scales) not in (1, len(files)):
        raise ValueError(f"got {len(files)} --lora and {len(scales)} --lora-scale; give one scale for all or one each")
    scales = scales or [1.0]
    return [(file, scales[i % len(scales)]) for i, file in enumerate(files)]


def _run(given: dict[str, Any], requests: list[VideoRequest]) -> dict[str, Any] | None:
    """Run and return the report; only rank 0 has one."""
    job = Job(
        requests=requests,
        fps=given["fps"],
        save_file=given["save_file"],
        output_folder=given["output_folder"],
        contact_sheet=given["contact_sheet"],
        metadata=not given["no_metadata"],
    )
    check_outputs(job)
    from wan_infer.run import run  # imports torch

    sources = ModelSources(
        model=given["model"],
        checkpoint=given["checkpoint_dir"],
        step=given["checkpoint_step"],
        ema=given["ema"],
        revision=given["revision"],
        vae_model=given["vae_checkpoint_dir"],
        text_model=given["t5_checkpoint_dir"],
        lora=_pair_loras(given["lora"], given["lora_scale"]),
        lora_mode=given["lora_mode"],
    )
    options = ComputeOptions(
        device=given["device"],
        dtype=given["dtype"],
        vae_dtype=given["vae_dtype"],
        t5_cpu=given["t5_cpu"],
        offload=given["offload_model"],
        tiles=given["vae_tiles"],
    )
    first = rank() == 0
    with open(os.devnull, "w", encoding="utf-8") as devnull:
        report = run(job, sources, options, _parallel_options(given), given["task"], sys.stderr if first else devnull)
    return report if first else None


def _show(report: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(report, ensure_ascii=False, indent=2))
        return
    for video in report["videos"]:
        click.echo(video["file"])
    seconds = report["seconds"]
    stages = ", ".join(f"{stage} {seconds[stage]:.1f}" for stage in ("load", "text", "denoise", "decode", "write"))
    count = len(report["videos"])
    memory = report["peak_memory_bytes"] / 2**30
    click.echo(
        f"{count} video{'s' if count > 1 else ''} in {seconds['total']:.1f} s ({stages}), {memory:.2f} GiB at most"
    )
