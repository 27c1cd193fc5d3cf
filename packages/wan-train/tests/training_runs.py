"""Tiny runs through the real command line."""

import functools
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from warm_ranks import Ended, WarmRanks

from wan_model.tiny import TINY_CONFIG, write_tiny_wan
from wan_model.weights.training_checkpoint import read_index
from wan_model.weights.transformer import expected_shapes, save_transformer
from wan_train.checkpoint.record import read_record, record_file, write_record
from wan_train.cli import pretrain
from wan_train.config.options import RunOptions

STEPS = 6
BASE_OPTIONS = (
    "--recipe", "tiny", f"train.train_iters={STEPS}", "train.global_batch_size=2",
    "scheduler.lr_warmup_iters=1", "optimizer.lr=0.01", "optimizer.min_lr=0.001",
)  # fmt: skip
RUN_OPTIONS = (*BASE_OPTIONS, "--mock")
# What the runs that are compared have besides.
CAPTION_DROPOUT, AVERAGE_DECAY, WEIGHT_DECAY = 0.3, 0.9, 0.05
FULLY_SHARDED = "dist.use_megatron_fsdp=true"


def wan_train(
    *arguments: str, timeout: float = 300, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The real command line, in processes of its own."""
    return subprocess.run(
        [sys.executable, "-c", "from wan_train.cli import main; main()", "pretrain", *arguments],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@functools.cache
def _warm_ranks() -> WarmRanks:
    return WarmRanks()


def train(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """A tiny run on random data that must succeed; returns its log."""
    return train_on((*RUN_OPTIONS, *arguments), folder)


def train_on(arguments: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """What ``wan-train pretrain ARGUMENTS checkpoint.save=FOLDER`` does, sooner; must succeed; returns the log."""
    ended = _run(arguments, folder)
    assert set(ended.codes) == {0}, ended.errors
    return read_log(folder)


def refused_on(arguments: Sequence[str], folder: Path) -> str:
    """The same, which must be refused in one sentence, which is returned."""
    ended = _run(arguments, folder)
    assert 2 in ended.codes, ended.errors
    assert set(ended.codes) <= {2, -signal.SIGKILL}, ended.errors
    assert "Traceback" not in ended.errors
    (said,) = {line.split(": ", 1)[1] for line in ended.errors.splitlines() if line.startswith("Error")}
    return said


def _run(arguments: Sequence[str], folder: Path) -> Ended:
    given = pretrain.make_context("pretrain", [*arguments, f"checkpoint.save={folder}"]).params
    ranks = given.pop("nproc_per_node")
    options = RunOptions(**{name: given[name] for name in RunOptions.__dataclass_fields__})
    return _warm_ranks().run(options.to_json(), ranks)


def train_for_equality(folder: Path, start: Path, *settings: str) -> None:
    """A run from the weights in that model folder with all that is compared: dropped captions, average, validations."""
    average = [] if FULLY_SHARDED in settings else [f"ema.decay={AVERAGE_DECAY}"]
    numbers = [f"model.flow.caption_dropout={CAPTION_DROPOUT}", f"optimizer.weight_decay={WEIGHT_DECAY}"]
    validation = ["validation.interval=3", "validation.samples=7"]
    train(folder, "--init-from", str(start), "checkpoint.save_interval=1", *numbers, *validation, *average, *settings)


def write_start(folder: Path) -> None:
    """Weights to start from: random ones everywhere, so that every gradient of the first step is alive.

    The official initialisation has a head of zeros, behind which nothing has a gradient yet.
    """
    generator = torch.Generator().manual_seed(3)
    state = {}
    for key, shape in expected_shapes(TINY_CONFIG).items():
        noise = torch.randn(shape, generator=generator)
        norm_weight = "norm" in key and key.endswith("weight")
        state[key] = 1 + 0.1 * noise if norm_weight else noise * (0.5 / shape[-1] ** 0.5 if len(shape) > 1 else 0.05)
    save_transformer(state, TINY_CONFIG, folder / "transformer")


SHAPES = [(3, 8, 8), (1, 6, 10), (2, 4, 10), (1, 4, 4)]


def write_dataset(folder: Path, train: int = 40, val: int = 6) -> None:
    """A dataset of small mixed latents as NVIDIA's script lays it out, and the model it was encoded with beside it."""
    from wan_data.shards.energon_metadata import write_metadata
    from wan_data.shards.writer import Sample, ShardWriter

    generator, records = torch.Generator().manual_seed(5), []
    data = folder / "data"
    data.mkdir(parents=True)
    write_tiny_wan(folder / "model")
    splits = [("train", start, min(start + 10, train)) for start in range(0, train, 10)] + (
        [("val", train, train + val)] if val else []
    )
    for number, (split, start, stop) in enumerate(splits):
        with ShardWriter(data, number, split) as shard:
            for i in range(start, stop):
                latent = torch.randn(TINY_CONFIG.in_channels, *SHAPES[i % len(SHAPES)], generator=generator)
                text = torch.randn(3 + i % 5, TINY_CONFIG.text_dim, generator=generator)
                shard.write(Sample(f"{i:06d}", latent, text, {"caption": f"sample {i}"}))
        assert shard.record is not None
        records.append(shard.record)
    write_metadata(data, records)


def data_options(folder: Path, workers: int = 0) -> list[str]:
    """Settings that train on what ``write_dataset`` wrote."""
    return [
        f"dataset.path={folder / 'data'}", f"dataset.encoded_by={folder / 'model'}", "dataset.capacity=96",
        "dataset.packing_buffer=8", f"dataset.num_workers={workers}",
    ]  # fmt: skip


def steps_of(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of steps, without events."""
    return [entry for entry in log if "event" not in entry]


def read_tensors(checkpoint: Path, prefixes: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """What a checkpoint stores under names that begin so, whole, by name without the beginning."""
    index = read_index(checkpoint)
    found: dict[str, torch.Tensor] = {}
    names = {}
    for name, entry in index.state_dict_metadata.items():
        for prefix in prefixes:
            if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata):
                found[name] = torch.empty(entry.size)
                names[name] = name.removeprefix(prefix)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        torch.distributed.checkpoint.load(found, checkpoint_id=checkpoint, no_dist=True)
    return {names[name]: tensor for name, tensor in found.items()}


def rewrite(checkpoint: Path, name: str, content: Any) -> None:
    """Change a file of a checkpoint, and its record with it."""
    step = int(checkpoint.name.removeprefix("iter_"))
    files = read_record(checkpoint, step)
    torch.save(content, checkpoint / name)
    write_record(checkpoint, step, {**files, name: record_file(checkpoint / name)})


def read_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
