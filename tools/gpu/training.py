"""wan-train through its command line: tiny runs with saves, resume and FSDP, and steps of the 1.3B model."""

import contextlib
import datetime
import functools
import json
import math
import re
import shutil
import statistics
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from common.training_log import read_steps
from gpu.commands import WAN_TRAIN, Started, start
from gpu.context import Context
from gpu.marked_tests import MarkedTests
from gpu.model import relative
from gpu.rows import Failed, Found, NotRun, Row, Value

_STEPS, _SAVED = 4, 2
_TINY = (
    *("pretrain", "--recipe", "tiny", "--mock", "mixed_precision=bf16_mixed", f"train.train_iters={_STEPS}"),
    *("scheduler.lr_warmup_iters=1", "optimizer.lr=0.01", "optimizer.min_lr=0.001", "logger.log_interval=1"),
    f"checkpoint.save_interval={_SAVED}",
)
_RUNS: dict[str, tuple[str, ...]] = {
    "whole": (),
    "asynchronous": ("checkpoint.async_save=true",),
    "fsdp": ("dist.use_megatron_fsdp=true", "model.recompute_granularity=selective"),
}
# On a CPU all runs are deterministic.
_DETERMINISTIC = ("model.deterministic_mode=true",)
_ON_GPU = {"deterministic": _DETERMINISTIC, "deterministic again": _DETERMINISTIC}
# Runs in bf16 that differ in the order of their sums; their first losses are equal within rounding.
_NEAR = 0.02
_MASTERS = "optimizer.state.param."
_STEP_LINE = re.compile(
    r"step (?P<step>\d+)/\d+  loss (?P<loss>\S+) .*?(?P<tokens>[\d,]+) tokens/s  (?P<tflops>\S+) TFLOP/s/device"
    r"(?:  MFU (?P<mfu>[\d.]+)%)?"
)


def _need_engine() -> None:
    from wan_train.engine.installed import require_installed

    try:
        require_installed()
    except ValueError as error:
        raise NotRun(str(error).split(":")[0]) from error


def _losses(folder: Path) -> dict[int, float]:
    """By step, as the log says last."""
    return {entry["step"]: entry["loss"] for entry in read_steps(folder)}


def _state(folder: Path, step: int) -> dict[str, Tensor]:
    """The weights of a checkpoint in their precision, and the fp32 copies of the optimizer."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    from wan_model.weights.training_checkpoint import find_checkpoint, read_index, read_training_checkpoint

    checkpoint = find_checkpoint(folder, step)
    _, _, weights = read_training_checkpoint(checkpoint, dtype=None)
    entries = read_index(checkpoint).state_dict_metadata
    masters = {
        name: torch.empty(entry.size)
        for name, entry in entries.items()
        if name.startswith(_MASTERS) and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(masters, checkpoint_id=checkpoint, no_dist=True)
    return {**weights, **masters}


class _Tiny:
    """The tiny runs, started together where there are processors for them, else when they are asked for."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._started: dict[str, Started] = {}

    def folder(self, name: str) -> Path:
        return self.context.folder / name / "checkpoints"

    def start(self, name: str, *options: str) -> None:
        arguments = [
            *WAN_TRAIN,
            *_TINY,
            *(_RUNS | _ON_GPU).get(name, ()),
            *options,
            f"checkpoint.save={self.folder(name)}",
        ]
        self._started[name] = start(arguments, self.context.folder / name / "log")

    @property
    def first(self) -> tuple[str, ...]:
        """The runs that need no other."""
        if self.context.quick:
            return ("whole",)
        return (*_RUNS, *(_ON_GPU if self.context.on_gpu else ()))

    def start_all(self) -> None:
        _need_engine()
        for name in self.first:
            self.start(name)

    def wait(self, name: str) -> float:
        """Seconds of a run that has succeeded."""
        _need_engine()
        if name != "whole":
            self.context.leave_out_if_quick()
        if name not in self._started:
            self.start(name)
        return self._started[name].wait(self.context.seconds_left)


def _numbers(folder: Path, took: float) -> dict[str, Value]:
    losses = _losses(folder)
    settings = (folder / f"iter_{_STEPS:07d}" / "run_config.yaml").read_text(encoding="utf-8")
    backend = re.search(r"distributed_backend: (\w+)", settings)
    return {
        "seconds with start": round(took, 1),
        "first loss": losses[1],
        "last loss": losses[max(losses)],
        "backend": backend[1] if backend else None,
    }


def _complete(folder: Path) -> list[int]:
    from wan_train.checkpoint.folder import complete_steps

    return complete_steps(folder)


def _require_both_saves(folder: Path, numbers: dict[str, Value]) -> None:
    if (steps := _complete(folder)) != [_SAVED, _STEPS]:
        raise Failed(f"the complete checkpoints are {steps}", numbers)


def whole_run(tiny: _Tiny) -> Found:
    """A run with two saves.

    Raises:
        Failed: it fails, or its losses or checkpoints are not those of four steps.
    """
    folder, took = tiny.folder("whole"), tiny.wait("whole")
    numbers, losses, steps = _numbers(folder, took), _losses(folder), _complete(folder)
    if sorted(losses) != [1, 2, 3, 4] or not all(math.isfinite(loss) for loss in losses.values()):
        raise Failed(f"the losses are {losses}", numbers)
    if steps != [_SAVED, _STEPS]:
        raise Failed(f"the complete checkpoints are {steps}", numbers)
    if numbers["backend"] != (wanted := "nccl" if tiny.context.on_gpu else "gloo"):
        raise Failed(f"it did not train on {wanted}", numbers)
    return Found("it trains in bf16, and both checkpoints are complete", numbers)


def kept_precision(tiny: _Tiny) -> Found:
    """What the checkpoint stores in which precision.

    Raises:
        Failed: a weight that the model keeps in fp32 was rounded.
    """
    from wan_model.dit.model import precision_of

    tiny.wait("whole")
    state = _state(tiny.folder("whole"), _STEPS)
    weights = {key: value for key, value in state.items() if not key.startswith(_MASTERS)}
    wrong = [key for key, value in weights.items() if value.dtype != precision_of(key, torch.bfloat16)]
    kept = sum(value.dtype == torch.float32 for value in weights.values())
    numbers: dict[str, Value] = {"weights": len(weights), "of them in fp32": kept}
    if wrong:
        raise Failed(f"{wrong[0]} and {len(wrong) - 1} more are in another precision than the model's", numbers)
    rounded = [key for key, value in weights.items() if not torch.equal(state[_MASTERS + key].to(value.dtype), value)]
    if rounded:
        raise Failed(f"{rounded[0]} is not the optimizer's fp32 copy, rounded", numbers)
    return Found("time embedder, modulation tables and affine norms are in fp32, the rest in bf16", numbers)


def _same_run(folder: Path, reference: Path, on_gpu: bool, numbers: dict[str, Value]) -> Found:
    """Losses, weights and optimizer of two runs."""
    mine, theirs = _losses(folder), _losses(reference)
    state, other = _state(folder, _STEPS), _state(reference, _STEPS)
    different = [name for name in other if not torch.equal(state[name], other[name])]
    loss = max(abs(mine[step] - theirs[step]) / theirs[step] for step in theirs)
    weight = max(relative(state[name], other[name]) for name in other)
    numbers |= {"tensors that differ": len(different), "losses off by": loss, "tensors off by": weight}
    if mine == theirs and not different:
        return Found("losses, weights and optimizer are equal to the bit", numbers)
    if not on_gpu or not (loss <= _NEAR and weight <= _NEAR):
        raise Failed(f"{len(different)} of {len(other)} tensors differ, first {different[:1]}", numbers)
    return Found("equal within rounding, not to the bit", numbers)


def resumed(tiny: _Tiny) -> Found:
    """A run that is stopped after its first save, and continued by the same command.

    Raises:
        Failed: it is another run than the uninterrupted one.
    """
    from wan_train.checkpoint.folder import delete_checkpoint

    tiny.wait("whole")
    tiny.context.leave_out_if_quick()
    folder = tiny.folder("resumed")
    shutil.copytree(tiny.folder("whole"), folder)
    delete_checkpoint(folder, _STEPS)
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "log.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= _SAVED))
    tiny.start("resumed")
    numbers = _numbers(folder, tiny.wait("resumed"))
    if '"resumed"' not in (folder / "log.jsonl").read_text(encoding="utf-8"):
        raise Failed("it began anew instead of resuming", numbers)
    return _same_run(folder, tiny.folder("whole"), tiny.context.on_gpu, numbers)


def saved_asynchronously(tiny: _Tiny) -> Found:
    """The same run, which trains on while it saves.

    Raises:
        Failed: its checkpoints are not those of the other run.
    """
    folder, took = tiny.folder("asynchronous"), tiny.wait("asynchronous")
    tiny.wait("whole")
    numbers = _numbers(folder, took)
    _require_both_saves(folder, numbers)
    return _same_run(folder, tiny.folder("whole"), tiny.context.on_gpu, numbers)


def deterministic(tiny: _Tiny) -> Found:
    """Two runs with ``model.deterministic_mode``.

    Raises:
        Failed: they are not equal to the bit.
    """
    tiny.context.need_gpu()
    folders = [tiny.folder(name) for name in _ON_GPU]
    took = max(tiny.wait(name) for name in _ON_GPU)
    return _same_run(folders[0], folders[1], False, _numbers(folders[0], took))


def fully_sharded(tiny: _Tiny) -> Found:
    """FSDP with selective recomputation.

    Raises:
        Failed: its losses are not those of the plain run.
    """
    folder, took = tiny.folder("fsdp"), tiny.wait("fsdp")
    tiny.wait("whole")
    mine, theirs = _losses(folder), _losses(tiny.folder("whole"))
    norms = [{entry["step"]: entry["grad_norm"] for entry in read_steps(one)} for one in (folder, tiny.folder("whole"))]
    norm_off = max(abs(norms[0].get(step, math.inf) - norm) / norm for step, norm in norms[1].items())
    off = {step: abs(mine.get(step, math.inf) - loss) / loss for step, loss in theirs.items()}
    numbers = {
        **_numbers(folder, took),
        "losses off by": max(off.values()),
        "norms off by": norm_off,
        "complete": str(_complete(folder)),
    }
    if not max(*off.values(), norm_off) <= _NEAR:
        raise Failed("the losses or norms of gradients are not those of the plain run", numbers)
    _require_both_saves(folder, numbers)
    return Found("the losses and norms are those of the plain run, and both checkpoints are complete", numbers)


def rows(context: Context) -> Iterator[Row]:
    """Tiny runs on one device, and beside them the tests that need a GPU."""
    tiny, tests = _Tiny(context), MarkedTests(context)
    if not context.done:
        yield from context.row("the runs are started", functools.partial(_started, tiny))
        with contextlib.suppress(Exception):  # its row says why
            tests.start()
    for name, check in (
        ("a run with two saves", whole_run),
        ("precision in the checkpoint", kept_precision),
        ("saved asynchronously", saved_asynchronously),
        ("FSDP with recomputation", fully_sharded),
        ("two deterministic runs", deterministic),
        ("resumed", resumed),
    ):
        yield from context.row(name, functools.partial(check, tiny), seconds=3)
    yield from context.row("tests marked gpu", tests.found, seconds=3)


def _started(tiny: _Tiny) -> Found:
    tiny.start_all()
    return Found("the runs are started together", {"runs": len(tiny.first)})


def _real_options(on_gpu: bool) -> list[str]:
    steps = ["train.train_iters=7" if on_gpu else "train.train_iters=3", "logger.log_interval=1", "--verbose"]
    if not on_gpu:
        return [*_TINY[:5], *steps]
    # 81 frames of 480 x 832.
    shapes = ["dataset.mock_settings.shapes=[[21,60,104]]", "dataset.capacity=32760"]
    return ["pretrain", "--recipe", "wan_1_3b", "--mock", *shapes, *steps]


def real_steps(context: Context) -> Found:
    """Steps of the 1.3B model through Megatron-Bridge, by the command's own lines.

    Raises:
        Failed: it fails or prints no step.
    """
    _need_engine()
    log, took, began = context.folder / "wan-train.log", 0.0, datetime.datetime.now()
    if context.quick:
        # Its lines are those of the run before.
        log = context.folder.parent / "training" / "whole" / "log"
    else:
        took = start([*WAN_TRAIN, *_real_options(context.on_gpu)], log).wait(context.seconds_left)
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    steps = [match.groupdict() for match in _STEP_LINE.finditer(text)]
    if len(steps) < 3:
        raise Failed(f"{len(steps)} lines of steps were printed", {"seconds with start": round(took, 1)})
    losses = [float(step["loss"]) for step in steps]
    # The first two steps compile and allocate.
    later = steps[2:]
    numbers: dict[str, Value] = {
        "seconds with start": round(took, 1),
        "steps": len(steps),
        "tokens/s": statistics.median(int(step["tokens"].replace(",", "")) for step in later),
        "TFLOP/s": statistics.median(float(step["tflops"]) for step in later),
        "MFU %": statistics.median([float(step["mfu"]) for step in later]) if later[0]["mfu"] else None,
        "first loss": losses[0],
        "last loss": losses[-1],
    }
    # By Megatron's own lines, in whole seconds.
    for what, when in re.findall(r"^\[after ([^\]]+)\] datetime: ([\d-]+ [\d:]+)", text, re.MULTILINE):
        numbers[f"seconds until {what}"] = round((datetime.datetime.fromisoformat(when) - began).total_seconds())
    if memory := re.findall(r"mem-max-allocated-gigabytes: ([\d.]+)", text):
        numbers["peak GB"] = float(memory[-1])
    if not all(math.isfinite(loss) for loss in losses):
        raise Failed("a loss is not finite", numbers)
    return Found("medians of all steps but the first two", numbers)


def real_rows(context: Context) -> Iterator[Row]:
    """The 1.3B recipe on a GPU; the tiny one on a CPU."""
    name = "wan_1_3b at 32,760 tokens, selective" if context.on_gpu else "tiny"
    yield from context.row(name, functools.partial(real_steps, context), seconds=5)
