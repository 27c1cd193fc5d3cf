"""The ``wan-train`` command. Imports of torch and Megatron wait until a command needs them."""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import click

from wan_model.precision import DTYPES
from wan_model.system.option_names import option_names
from wan_model.system.option_types import LocalPath
from wan_model.system.standard_streams import CheckedCommand
from wan_train.config.options import RECIPES, RunOptions

F = TypeVar("F", bound=Callable[..., Any])


_LOCAL_PATH = LocalPath(path_type=Path)


class _RefusedInputError(click.ClickException):
    exit_code = 2


@contextlib.contextmanager
def _refusals_printed() -> Iterator[None]:
    """A ``ValueError`` in the block ends the command with its sentence."""
    try:
        yield
    except ValueError as error:
        raise _RefusedInputError(str(error)) from error


class _Commands(CheckedCommand, click.Group):
    """A group whose commands end with a sentence at errors of the system, such as a full disk."""


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="wan-train")
def main() -> None:
    """Train Wan 2.1 text-to-video models in parallel with Megatron."""


def _with_run_options(*, init_from_required: bool, training_mode: str) -> Callable[[F], F]:
    """The options of the commands that train."""
    options = [
        click.option(
            "--recipe", type=click.Choice(RECIPES),
            help="Model and default settings; wan_1_3b if neither this nor --config-file sets it.",
        ),
        click.option(
            *option_names("training-mode"), type=click.Choice(["pretrain", "finetune"]), default=training_mode,
            show_default=True, help="Preset of timestep density and shift.",
        ),
        click.option(
            *option_names("config-file"), metavar="FILE",
            help="YAML file applied over the recipe, or a name from `config list`.",
        ),
        click.option(
            *option_names("init-from"), metavar="MODEL", required=init_from_required,
            help="Initial weights: the transformer of a model in diffusers' layout, a folder or hub id.",
        ),
        click.option("--mock", is_flag=True, help="Train on random data with the shapes in dataset.mock_settings."),
        click.option(
            *option_names("nproc-per-node"), type=click.IntRange(1), default=1, show_default=True,
            help="Processes to start on this machine. Omit it under torchrun.",
        ),
        click.option(
            "--verbose", is_flag=True,
            help="Print Megatron's own output, which is otherwise written to a file beside the log.",
        ),
        click.option(
            *option_names("dry-run"), is_flag=True,
            help="Validate the configuration and print layout, memory and FLOPs, without training.",
        ),
        click.option(
            *option_names("world-size"), type=click.IntRange(1),
            help="With --dry-run: number of processes of the planned cluster.",
        ),
        click.option("--json", "as_json", is_flag=True, help="With --dry-run: print JSON."),
        click.argument("overrides", nargs=-1, metavar="[KEY.PATH=VALUE]..."),
    ]  # fmt: skip

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


@main.command()
@_with_run_options(init_from_required=False, training_mode="pretrain")
def pretrain(**given: Any) -> None:
    """Train a model; the same command again resumes from checkpoint.save.

    \b
    wan-train pretrain --config-file wan_1_3b --nproc-per-node 8 dataset.path=DATA checkpoint.save=CHECKPOINTS
    """
    _train("pretrain", **given)


@main.command()
@_with_run_options(init_from_required=True, training_mode="finetune")
def finetune(**given: Any) -> None:
    """Continue from released weights in a short run, with lora.rank=N as a LoRA of rank N.

    \b
    wan-train finetune --config-file wan_1_3b_lora --init-from MODEL dataset.path=DATA checkpoint.save=CHECKPOINTS

    Defaults that differ from pretrain's: the preset of timesteps, and 2,000 steps of constant learning rate (1e-5, or
    1e-4 of a LoRA) after 100 of warm-up, with a checkpoint after every 250.
    """
    _train("finetune", **given)


def _train(
    command: Literal["pretrain", "finetune"],
    *,
    nproc_per_node: int,
    dry_run: bool,
    world_size: int | None,
    as_json: bool,
    **given: Any,
) -> None:
    from wan_model.system.versions import check_dependencies
    from wan_train.engine.installed import require_installed
    from wan_train.launch.launcher import launch

    options = RunOptions(command=command, **given)
    try:
        check_dependencies("wan-train")
        require_installed()
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    if dry_run:
        _dry_run(options, world_size or nproc_per_node, as_json)
        return
    if world_size is not None or as_json:
        raise click.ClickException(
            "--world-size and --json need --dry-run; a run takes its number of processes from torchrun"
        )
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:  # one process of torchrun's
        if nproc_per_node != 1:
            raise click.ClickException(
                "--nproc-per-node is given under torchrun, which has started the processes; leave it out"
            )
        sys.argv = [sys.argv[0], options.to_json()]
        from wan_model.system.child_process import end_process
        from wan_train.launch import worker

        end_process(worker.main())
    sys.exit(launch(options, nproc_per_node))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress Megatron's output during its import."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _dry_run(options: RunOptions, world: int, as_json: bool) -> None:
    with _refusals_printed(), _quiet():
        from wan_train.planning.dry_run import main as describe

        lines = describe(options, world, as_json=as_json)
    for line in lines:
        click.echo(line)


@main.command("plan")
@click.option("--model", type=click.Choice(["1.3b", "14b"]), default="14b", show_default=True, help="Model.")
@click.option(
    "--gpus", type=click.IntRange(1), multiple=True, metavar="N",
    help="Number of GPUs; repeatable. Default: 8 to 1024.",
)  # fmt: skip
@click.option(
    "--gpu", default="h100", show_default=True, metavar="NAME|FILE",
    help="h100, h200, or a YAML file with the values that differ from an h100.",
)  # fmt: skip
@click.option(
    "--shape", default="81x480x832", show_default=True, metavar="FRAMESxHEIGHTxWIDTH",
    help="Shape of the training videos.",
)  # fmt: skip
@click.option("--capacity", type=click.IntRange(1), default=43008, show_default=True, help="Tokens of a pack.")
@click.option(
    "--packs", type=click.IntRange(1), metavar="N",
    help="Minimum packs per step. Default: one per 8 GPUs, at least 8.",
)  # fmt: skip
@click.option(
    "--best", type=click.IntRange(1), default=1, show_default=True, help="Layouts to print per number of GPUs."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON with every part of memory and time.")
def plan_command(**options: Any) -> None:
    """Estimate the fastest layout for a number of GPUs, its memory and its step time.

    \b
    wan-train plan --model 14b --gpus 64 --gpus 128
    """
    from wan_train.planning.plan import main as make_plan

    with _refusals_printed():
        lines = make_plan(**options)
    for line in lines:
        click.echo(line)


_OF_STEP = click.option("--step", type=click.IntRange(0), help="Step to read. Default: the newest complete one.")
_OF_EMA = click.option("--ema", is_flag=True, help="Write the EMA instead of the weights.")


@main.command("export")
@click.argument("checkpoints", type=_LOCAL_PATH)
@click.argument("out", type=_LOCAL_PATH, required=False)
@_OF_STEP
@_OF_EMA
@click.option(
    "--dtype", type=click.Choice(["stored", *DTYPES, "float16"]), default="stored", show_default=True,
    help="Precision of the tensors; stored: unchanged; float32: of the optimizer's fp32 weights; float16: of a LoRA.",
)  # fmt: skip
@click.option("--lora", type=_LOCAL_PATH, metavar="FILE", help="Write the run's LoRA as one file instead of OUT.")
@click.option(
    "--format", "lora_format", type=click.Choice(["diffusers", "comfyui", "kohya"]), default="diffusers",
    show_default=True, help="With --lora: the programs that will read it.",
)  # fmt: skip
def export_command(
    checkpoints: Path, out: Path | None, step: int | None, ema: bool, dtype: str, lora: Path | None, lora_format: str
) -> None:
    """Write a step of a training run as a model in diffusers' layout, OUT/transformer, or as a LoRA file.

    \b
    wan-train export CHECKPOINTS MODEL --ema
    wan-train export CHECKPOINTS --lora my_lora.safetensors --format comfyui
    """
    if (out is None) == (lora is None):
        raise click.UsageError("expected either OUT, for a model, or --lora FILE, for the LoRA of a run")
    with _refusals_printed():
        if lora is not None:
            from wan_train.checkpoint.adapters import export_lora

            stored = "stored" if dtype == "float32" else dtype  # adapters are fp32
            read = export_lora(checkpoints, lora, format=lora_format, step=step, ema=ema, dtype=stored)
            written, what = lora, "LoRA"
        else:
            assert out is not None, "checked above"
            from wan_train.checkpoint.export import export

            if dtype == "float16":
                raise ValueError("--dtype is float16, which is for --lora; expected stored, float32 or bfloat16")
            read = export(checkpoints, out, step=step, ema=ema, dtype=dtype)
            written, what = out / "transformer", "weights"
    click.echo(f"{written}: the {'EMA' if ema else what} of {read}")


@main.command("merge")
@click.argument("lora", metavar="CHECKPOINTS|FILE", type=_LOCAL_PATH)
@click.argument("out", type=_LOCAL_PATH)
@click.option("--model", metavar="MODEL", help="The base: a folder or hub id. Default: that of the run.")
@_OF_STEP
@_OF_EMA
@click.option(
    "--dtype", type=click.Choice(["stored", *DTYPES]), default="stored", show_default=True,
    help="Precision of the weights; stored: that of the base.",
)  # fmt: skip
def merge_command(lora: Path, out: Path, model: str | None, step: int | None, ema: bool, dtype: str) -> None:
    """Merge the LoRA of a run, or a LoRA file of any trainer, into its base.

    OUT/transformer is a model in diffusers' layout.

    \b
    wan-train merge CHECKPOINTS OUT
    wan-train merge my_lora.safetensors OUT --model MODEL
    """
    from wan_model.weights.lora_reading import find_lora

    with _refusals_printed():
        if find_lora(lora).is_file():
            if model is None or step is not None or ema:
                raise ValueError(
                    f"{lora} is a LoRA file, which names no base and has no steps and no EMA; give --model MODEL, and "
                    "neither --step nor --ema"
                )
            from wan_train.checkpoint.adapters import merge_file

            if sentence := merge_file(lora, out, model, dtype=dtype):
                click.echo(f"Warning: {sentence}; it is merged all the same", err=True)
            click.echo(f"{out / 'transformer'}: {model} with the LoRA {lora}")
            return
        from wan_train.checkpoint.adapters import merge

        read = merge(lora, out, model=model, step=step, ema=ema, dtype=dtype)
    click.echo(f"{out / 'transformer'}: its base with the {'EMA of the ' if ema else ''}LoRA of {read}")


@main.command("report")
@click.argument("checkpoints", type=_LOCAL_PATH)
@click.option(
    "--compare", type=_LOCAL_PATH, multiple=True, metavar="OTHER",
    help="Checkpoint folder of a run to compare with; repeatable.",
)  # fmt: skip
@click.option("--out", type=_LOCAL_PATH, help="HTML file. Default: report.html in CHECKPOINTS.")
@click.option("--follow", is_flag=True, help="Serve the page to this machine while the run goes on; write no file.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=0, metavar="N",
    help="With --follow: port. Default: a free one.",
)  # fmt: skip
@click.option(
    "--max-video-mb", type=click.IntRange(0), default=20, show_default=True, metavar="MB",
    help="Megabytes of sampled videos in the page.",
)  # fmt: skip
def report_command(
    checkpoints: Path, compare: tuple[Path, ...], out: Path | None, follow: bool, port: int, max_video_mb: int
) -> None:
    """Show a run's curves, sampled videos and configuration in one HTML file, from its folder alone.

    \b
    wan-train report CHECKPOINTS --compare OTHER --out report.html
    wan-train report CHECKPOINTS --follow
    """
    from wan_train.report.page import write_page
    from wan_train.report.server import Follower, serve

    folders, video_bytes = [checkpoints, *compare], max_video_mb * 10**6
    if port and not follow:
        raise click.ClickException("--port is of the page that --follow serves; add --follow or leave --port out")
    if follow and out is not None:
        raise click.ClickException("--follow serves the page and writes no file; leave --out or --follow out")
    with _refusals_printed():
        if follow:
            serve(Follower(folders, video_bytes), port, announce=click.echo)
        else:
            click.echo(write_page(folders, out, video_bytes=video_bytes))


@main.group()
def config() -> None:
    """The configuration files of wan-train."""


@config.command("list")
def config_list() -> None:
    """List them with a description."""
    from wan_train.config.shipped_configs import names, summary

    width = max(map(len, names()))
    for name in names():
        click.echo(f"{name:{width}}  {summary(name)}")


@config.command("show")
@click.argument("name")
@click.option("--resolved", is_flag=True, help="Print every key with its value.")
def config_show(name: str, resolved: bool) -> None:
    """Print one of them."""
    from wan_train.config.shipped_configs import path_of

    try:
        text = path_of(name).read_text(encoding="utf-8")
        click.echo(_resolved(name) if resolved else text, nl=False)
    except ValueError as error:
        raise click.ClickException(str(error)) from error


def _resolved(name: str) -> str:
    import yaml

    from wan_train.engine.installed import require_installed

    require_installed()
    with _quiet():
        from wan_train import engine
        from wan_train.config.overrides import settable

        engine.start(take_device=False)
        from wan_train.loop.run import build_config

        values = settable(build_config(RunOptions(None, config_file=name)))
    return yaml.safe_dump(values, sort_keys=False)


@config.command("copy")
@click.argument("name")
@click.argument("target", type=_LOCAL_PATH, default=".")
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
def config_copy(name: str, target: Path, force: bool) -> None:
    """Copy one of them, to edit it."""
    from wan_train.config.shipped_configs import copy

    try:
        click.echo(copy(name, target, force=force))
    except ValueError as error:
        raise click.ClickException(str(error)) from error
