"""The command lines that make a world's dataset, train on it and sample from the run, and the settings that fit it.

Both ``quickstart`` and ``world`` run them. Each function returns a program and its arguments, with paths as given.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from small_world.adherence import Request
from small_world.scenes import FRAMES, World
from wan_model.system.files import write_bytes

CLIPS = 480
TEXT_LENGTH = 16  # tokens; the captions have fewer
CAPACITY = 384  # tokens of a pack: some twenty-four clips of 12 to 18 tokens, or eleven of 27 to 36

TRAINING: Mapping[str, str] = {
    "model.flow.caption_dropout": "0.1",
    "model.flow.density": "uniform",
    "model.flow.shift": "3.0",
    "optimizer.lr": "3e-3",
    "optimizer.min_lr": "1e-4",
    "optimizer.adam_beta2": "0.95",
    "scheduler.lr_warmup_iters": "50",
    "ema.decay": "0.99",
}
# What of the model folder's transformer/config.json the recipe has otherwise.
SIZES_OF_MODEL = ["num_attention_heads", "attention_head_dim", "num_layers", "ffn_dim", "text_dim", "freq_dim"]

SAMPLING: Mapping[str, str] = {"--sample-steps": "20", "--sample-guide-scale": "1.5", "--negative-prompt": ""}


def draw_clips(world: World, clips: str, count: int = CLIPS) -> list[str]:
    """Draw clips of the scenes that are not held out."""
    return ["python", "-m", "small_world.clips", clips, "--world", world.name, "--count", str(count)]


def write_model(model: str) -> list[str]:
    """Write the model folder."""
    return ["python", "-m", "small_world.model", model]


def prepare(world: World, clips: str, dataset: str, model: str) -> list[str]:
    """Encode the clips to shards, each clip in its own size."""
    # Pixels of the largest size; the aspect buckets of this area are all sizes of the world.
    area = max(height * width for height, width in world.sizes)
    return [
        "wan-data", "prepare", "--video-folder", clips, "--output-folder", dataset, "--model", model,
        "--windows", "first", "--frames", str(FRAMES), "--area", str(area), "--text-length", str(TEXT_LENGTH),
        "--validation-fraction", "0.1", "--num-processes", "2", "--batch-size", "8",
    ]  # fmt: skip


def sizes_of_model(model: Path) -> dict[str, str]:
    """Settings of the transformer, as the model folder has it."""
    sizes = json.loads((model / "transformer" / "config.json").read_text(encoding="utf-8"))
    return {f"model.transformer.{name}": str(sizes[name]) for name in SIZES_OF_MODEL}


def pretrain(
    dataset: str, checkpoints: str, settings: Mapping[str, str], *, processes: int, options: Sequence[str] = ()
) -> list[str]:
    """Train.

    Args:
        dataset: folder of shards.
        checkpoints: where the run is saved.
        settings: values by their keys, over the recipe ``tiny``.
        processes: on this machine.
        options: others of the command.
    """
    return _train("pretrain", dataset, checkpoints, settings, processes, options)


def finetune(dataset: str, checkpoints: str, settings: Mapping[str, str], *, base: str, processes: int) -> list[str]:
    """Train from the weights of a model folder, with ``lora.rank`` a LoRA on them; see ``pretrain``."""
    return _train("finetune", dataset, checkpoints, settings, processes, ["--init-from", base])


def _train(
    command: str,
    dataset: str,
    checkpoints: str,
    settings: Mapping[str, str],
    processes: int,
    options: Sequence[str],
) -> list[str]:
    return [
        "wan-train", command, "--recipe", "tiny", "--nproc-per-node", str(processes), *options,
        f"dataset.path={dataset}", f"checkpoint.save={checkpoints}",
        *(f"{key}={value}" for key, value in settings.items()),
    ]  # fmt: skip


def export(checkpoints: str, model: str) -> list[str]:
    """Write the EMA of a run's weights as a model folder."""
    return ["wan-train", "export", checkpoints, model, "--ema"]


def export_lora(checkpoints: str, file: str) -> list[str]:
    """Write the EMA of a run's LoRA as a file."""
    return ["wan-train", "export", checkpoints, "--lora", file, "--ema"]


def write_requests(world: World, asked: Sequence[Request], path: Path) -> None:
    """Write the file of prompts that ``sample`` takes.

    Raises:
        OSError: it cannot be written; the error names the path.
    """
    lines = [json.dumps(request.line(world)) + "\n" for request in asked]
    write_bytes(path, "".join(lines).encode())


def sample(
    checkpoints: str,
    model: str,
    requests: str,
    videos: str,
    *,
    step: int | None = None,
    ema: bool = True,
    lora: str | None = None,
    settings: Mapping[str, str] = SAMPLING,
) -> list[str]:
    """Sample the requests; the result is printed as JSON.

    Args:
        checkpoints: of the run.
        model: folder of the text encoder and the autoencoder.
        requests: see ``write_requests``.
        videos: folder for the videos.
        step: of the checkpoint; None for the newest.
        ema: of the weights, instead of the weights.
        lora: a file that is merged into them.
        settings: values by their options.
    """
    return [
        "wan-infer", "--checkpoint-dir", checkpoints, *(["--checkpoint-step", str(step)] if step is not None else []),
        "--model", model, "--prompts-file", requests, *(["--ema"] if ema else []),
        *(["--lora", lora] if lora is not None else []),
        *(part for option in settings.items() for part in option), "--output-folder", videos, "--json",
    ]  # fmt: skip


def sampled_files(printed: Path, root: Path) -> list[Path]:
    """The videos that ``sample`` wrote, in the order of the requests.

    Args:
        printed: a file with what it printed.
        root: where it ran.
    """
    found: dict[str, Any] = json.loads(printed.read_text(encoding="utf-8"))
    return [root / video["file"] for video in found["videos"]]
