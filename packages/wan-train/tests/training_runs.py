"""Tiny runs through the real command line."""

import dataclasses
import functools
import json
import os
import shutil
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
from warm_ranks import Call, Ended, Ranks, WarmRanks

from wan_model.tiny import TINY_CONFIG, write_tiny_wan
from wan_model.weights.training_checkpoint import find_checkpoint, read_index, read_training_checkpoint
from wan_model.weights.transformer import expected_shapes, save_transformer
from wan_train.checkpoint.folder import saved_steps, step_folder
from wan_train.checkpoint.record import read_record, record_file, write_record
from wan_train.cli import pretrain
from wan_train.config.options import RunOptions

SOAK = bool(os.environ.get("WAN_SOAK"))
STEPS = 6
STEPS_ON_DATA = 12 if SOAK else 8  # the training split holds some five steps
EQUALITY_SEED = 3
EQUALITY_STEPS = 4  # enough for a warm-up, a decay, two validations and an average
BASE_OPTIONS = (
    "--recipe", "tiny", f"train.train_iters={STEPS}", "train.global_batch_size=2",
    "scheduler.lr_warmup_iters=1", "optimizer.lr=0.01", "optimizer.min_lr=0.001",
)  # fmt: skip
RUN_OPTIONS = (*BASE_OPTIONS, "--mock")
# What the runs that are compared have besides.
CAPTION_DROPOUT, AVERAGE_DECAY, WEIGHT_DECAY = 0.3, 0.9, 0.05
SAMPLES, SAMPLE_STEPS, SAMPLE_GUIDANCE, SAMPLE_SEED = 3, 3, 2.0, 11
# Parts of a layout.
FULLY_SHARDED = "dist.use_megatron_fsdp=true"
TENSOR = "model.tensor_model_parallel_size=2"
SEQUENCE = "model.sequence_parallel=true"
CONTEXT = "model.context_parallel_size=2"
PIPELINE = "model.pipeline_model_parallel_size=2"
OVERLAP = ("ddp.overlap_grad_reduce=true", "ddp.overlap_param_gather=true")
# The tiny model, or its adapters, in several of them; gradients are reduced and weights gathered a bucket at a time.
SMALL_BUCKETS = "ddp.bucket_size=500"
ELEMENTWISE, SELECTIVE, FULL, NO_RECOMPUTE = (
    f"model.recompute_granularity={mode}" for mode in ("elementwise", "selective", "full", "null")
)


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


# Common to the workers of a session; set by conftest.py.
ranks_folder: Path | None = None


@functools.cache
def warm_ranks() -> WarmRanks:
    assert ranks_folder is not None, "set by conftest.py"
    return WarmRanks(ranks_folder)


def train(folder: Path, *arguments: str, calls: Sequence[Call] = ()) -> list[dict[str, Any]]:
    """A tiny run on random data that must succeed; returns its log."""
    return train_on((*RUN_OPTIONS, *arguments), folder, calls)


def train_on(arguments: Sequence[str], folder: Path, calls: Sequence[Call] = ()) -> list[dict[str, Any]]:
    """What ``wan-train pretrain ARGUMENTS checkpoint.save=FOLDER`` does, sooner; must succeed; returns the log.

    Each rank makes the calls first.
    """
    # Videos are lossy, so what samples are compared by are their latents.
    sampled = any(argument.startswith("samples.interval=") for argument in arguments)
    keep = [Call("rank_calls:keep_latents", [str(folder / "latents")])] if sampled else []
    ended = run(arguments, folder, calls=[*calls, *keep])
    assert set(ended.codes) == {0}, ended.errors
    log = read_log(folder)
    assert not [entry for entry in log if "failure" in entry], "a failure of sampling ends no run"
    return log


def refused(folder: Path, *arguments: str) -> str:
    """A tiny run on random data that must be refused in one sentence, which is returned."""
    return refused_on((*RUN_OPTIONS, *arguments), folder)


def refused_on(arguments: Sequence[str], folder: Path) -> str:
    """The same with all arguments."""
    return sentence_of(run(arguments, folder))


def sentence_of(ended: Ended) -> str:
    """The sentence of ranks that were refused, or the lines of different ones."""
    assert 2 in ended.codes, ended.errors
    assert set(ended.codes) <= {2, -signal.SIGKILL}, ended.errors
    errors = ended.errors.splitlines()
    assert all(line.startswith("Error") for line in errors), ended.errors
    return "\n".join(sorted({line.split(": ", 1)[1] for line in errors}))


def run(arguments: Sequence[str], folder: Path, **options: Any) -> Ended:
    """The same, however it ends; options are those of ``WarmRanks.start``."""
    return start(arguments, folder, **options).wait()


def run_options(given: dict[str, Any]) -> RunOptions:
    """Of what ``wan-train pretrain`` was given."""
    return RunOptions(**{name: given[name] for name in RunOptions.__dataclass_fields__ if name in given})


def start(arguments: Sequence[str], folder: Path, **options: Any) -> Ranks:
    """The same, not waited for."""
    given = pretrain.make_context("pretrain", [*arguments, f"checkpoint.save={folder}"]).params
    ranks = given.pop("nproc_per_node")
    argument = run_options(given).to_json()
    return warm_ranks().start(argument, ranks, **options)


def call(function: str, *arguments: Any) -> Ended:
    """A function (``module:name``) in a process where the engine is imported; must succeed."""
    ended = warm_ranks().start(None, calls=[Call(function, arguments)]).wait()
    assert ended.codes == [0], ended.errors
    return ended


def equality_options(start: Path, seed: int, *settings: str) -> tuple[str, ...]:
    """A run from the weights in that model folder with all that is compared.

    That is dropped captions, EMA, validations, and samples from the EMA after the last step.
    """
    ema = () if FULLY_SHARDED in settings else (f"ema.decay={AVERAGE_DECAY}", "samples.ema=true")
    samples = (
        f"samples.interval={EQUALITY_STEPS}", f"samples.count={SAMPLES}", f"samples.steps={SAMPLE_STEPS}",
        f"samples.guidance={SAMPLE_GUIDANCE}", f"samples.seed={SAMPLE_SEED}",
    )  # fmt: skip
    numbers = (f"model.flow.caption_dropout={CAPTION_DROPOUT}", f"optimizer.weight_decay={WEIGHT_DECAY}")
    steps = (f"train.train_iters={EQUALITY_STEPS}", "checkpoint.save_interval=2")
    validation = ("validation.interval=2", "validation.samples=7")
    # Texts without padding, between which attention has something to choose; dropped ones are nothing but padding.
    random = (f"rng.seed={seed}", f"dataset.seed={seed}", "dataset.mock_settings.context_length=512")
    return ("--init-from", str(start), *steps, *numbers, *validation, *random, *samples, *ema, *settings)


def stopped_after(step: int, run: Path, folder: Path) -> Path:
    """What a run would have left that was stopped after that step: FOLDER, which is returned."""
    shutil.copytree(run, folder)
    for later in saved_steps(folder):
        if later > step:
            shutil.rmtree(step_folder(folder, later))
    shutil.rmtree(folder / "latents", ignore_errors=True)
    lines = (folder / "log.jsonl").read_text().splitlines(keepends=True)
    (folder / "log.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
    return folder


def trajectory(folder: Path) -> dict[int, tuple[str, str, str]]:
    """Loss, gradient norm and learning rate of each step, to the bit, as the log says last."""
    return {
        entry["step"]: tuple(float(entry[name]).hex() for name in ("loss", "grad_norm", "learning_rate"))
        for entry in steps_of(read_log(folder))
    }  # type: ignore[misc]


def same_weights(one: Path, other: Path, step: int) -> bool:
    """To the bit, their EMA included where the other has one."""
    states = []
    for folder in (one, other):
        checkpoint = find_checkpoint(folder, step)
        weights = read_training_checkpoint(checkpoint, dtype=torch.float32)[2]
        states.append({**weights, **{f"ema.{key}": ema for key, ema in read_tensors(checkpoint, ("ema.",)).items()}})
    return all(torch.equal(states[0][key], states[1][key]) for key in states[1])


def write_start(folder: Path, seed: int = EQUALITY_SEED) -> None:
    """A model to start from: random weights everywhere, so that every gradient of the first step is alive.

    The official initialisation has a head of zeros, behind which nothing has a gradient yet.
    """
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in expected_shapes(TINY_CONFIG).items():
        noise = torch.randn(shape, generator=generator)
        norm_weight = "norm" in key and key.endswith("weight")
        state[key] = 1 + 0.1 * noise if norm_weight else noise * (0.5 / shape[-1] ** 0.5 if len(shape) > 1 else 0.05)
    write_tiny_wan(folder)  # with the decoder of the samples
    save_transformer(state, TINY_CONFIG, folder / "transformer")


SHAPES = [(3, 8, 8), (1, 6, 10), (2, 4, 10), (1, 4, 4)]


def write_dataset(
    folder: Path, train: int = 40, val: int = 6, *, seed: int = 5, manifest: bool = False, text_length: int = 512
) -> None:
    """A dataset of small mixed latents, and the model it was encoded with beside it.

    As NVIDIA's script lays it out; with a manifest as ``wan-data prepare --text-length`` does.
    """
    from wan_data.shards.energon_metadata import write_metadata
    from wan_data.shards.writer import Sample, ShardWriter

    generator, records = torch.Generator().manual_seed(seed), []
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
    if manifest:
        from wan_data.index.manifest import Manifest
        from wan_data.reading.datasets import read_latent_spec

        spec = read_latent_spec(data, encoded_by=str(folder / "model"))
        spec, settings = dataclasses.replace(spec, text_length=text_length), {"mode": "video", "fps": "16"}
        Manifest(True, "0.1", spec, settings, shards=tuple(records), next_shard=len(records)).write(data)


def data_options(folder: Path, workers: int = 0) -> list[str]:
    """Settings that train on what ``write_dataset`` wrote."""
    return [
        f"dataset.path={folder / 'data'}", f"dataset.encoded_by={folder / 'model'}", "dataset.capacity=96",
        "dataset.packing_buffer=8", f"dataset.num_workers={workers}",
    ]  # fmt: skip


def train_on_data(folder: Path, dataset: Path, workers: int = 0, *, last: int = STEPS_ON_DATA) -> list[dict[str, Any]]:
    """A tiny run on what ``write_dataset`` wrote, saved after each second step; returns its log."""
    options = (*BASE_OPTIONS, *data_options(dataset, workers), "ema.decay=0.9")
    return train_on((*options, f"train.train_iters={last}", f"checkpoint.save_interval={1 if SOAK else 2}"), folder)


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
    """Change a file of a checkpoint, text or what torch saves, and its record with it."""
    step = int(checkpoint.name.removeprefix("iter_"))
    files = read_record(checkpoint, step)
    if isinstance(content, str):
        (checkpoint / name).write_text(content)
    else:
        torch.save(content, checkpoint / name)
    write_record(checkpoint, step, {**files, name: record_file(checkpoint / name)})


def read_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
