"""``wan-train plan``: the fastest layout for a number of GPUs, its memory and step time.

No process is started and Megatron is not imported: every valid layout is estimated by
``wan_train.planning.memory`` and ``wan_train.planning.step_time``.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from wan_model import WAN_1_3B, WAN_14B
from wan_model.config import WanConfig
from wan_model.dit.recompute import Recompute
from wan_model.pack import PackLayout
from wan_model.video_shape import SIDE_MULTIPLE, TEMPORAL_STRIDE, check_frames, check_side
from wan_train.model.layout import Layout
from wan_train.model.recompute_granularity import RECOMPUTE
from wan_train.planning.hardware import Hardware
from wan_train.planning.memory import RankBytes, rank_bytes
from wan_train.planning.step_time import StepTime

MODELS = {"1.3b": WAN_1_3B, "14b": WAN_14B}
RECIPES = {"1.3b": "wan_1_3b", "14b": "wan_14b"}
DEFAULT_GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
# By the names of ``model.recompute_granularity``, as they are written in YAML.
SETTING: dict[Recompute, str] = {mode: name or "null" for name, mode in RECOMPUTE.items()}
_SIZES = (1, 2, 4, 8, 16)


@dataclasses.dataclass(frozen=True)
class Plan:
    """One layout with its estimates.

    Attributes:
        layout: of the run.
        recompute: activation recomputation.
        packs: packs per step, over all ranks.
        capacity: tokens of a pack, padded for the layout.
        memory: of the rank that needs most.
        time: of a step.
    """

    layout: Layout
    recompute: Recompute
    packs: int
    capacity: int
    memory: RankBytes
    time: StepTime

    def settings(self) -> list[str]:
        """The overrides of ``wan-train pretrain`` for it."""
        layout = self.layout
        given = [f"train.global_batch_size={self.packs}", f"dataset.capacity={self.capacity}"]
        for name, size in (("tensor_model", layout.tensor), ("context", layout.context), ("pipeline", layout.pipeline)):
            if size > 1:
                key = f"model.{name}_parallel_size" if name != "pipeline" else "model.pipeline_model_parallel_size"
                given.append(f"{key}={size}")
        if layout.sequence:
            given.append("model.sequence_parallel=true")
        if layout.fully_sharded:
            given.append("dist.use_megatron_fsdp=true")
        elif layout.data > 1:
            given += ["ddp.overlap_grad_reduce=true", "ddp.overlap_param_gather=true"]
        return [*given, f"model.recompute_granularity={SETTING[self.recompute]}"]


def pack_of(model: WanConfig, shape: tuple[int, int, int], capacity: int) -> PackLayout:
    """A pack filled with videos of one shape.

    Args:
        model: sizes.
        shape: frames, height and width in pixels.
        capacity: tokens.

    Raises:
        ValueError: a shape that the latent grid does not divide, or that exceeds the capacity.
    """
    frames, height, width = shape
    check_frames("the number of frames of the shape", frames)
    check_side("the height of the shape", height)
    check_side("the width of the shape", width)
    grid = ((frames - 1) // TEMPORAL_STRIDE + 1, height // SIDE_MULTIPLE, width // SIDE_MULTIPLE)
    tokens = grid[0] * grid[1] * grid[2]
    if tokens > capacity:
        raise ValueError(
            f"a video of that shape has {tokens:,} tokens, more than a pack's {capacity:,}; raise --capacity"
        )
    return PackLayout((grid,) * (capacity // tokens))


def layouts(model: WanConfig, gpus: int, machine: int) -> Iterator[Layout]:
    """The layouts to estimate: tensor parallelism within a machine, pipelines without FSDP."""
    for tensor, context, pipeline in itertools.product(_SIZES, _SIZES, _SIZES):
        # With heads that do not divide, context parallelism gathers keys and values, which the formulae do not model.
        if tensor > machine or model.num_heads % (tensor * context) or model.num_layers % pipeline:
            continue
        if gpus % (tensor * context * pipeline):
            continue
        yield Layout(gpus, tensor, context, pipeline, sequence=tensor > 1)
        if pipeline == 1 and gpus > tensor:
            yield Layout(gpus, tensor, context, sequence=tensor > 1, fully_sharded=True)


def candidates(model: WanConfig, pack: PackLayout, gpus: int, hardware: Hardware, packs: int) -> list[Plan]:
    """The layouts that fit, fastest first.

    Args:
        model: sizes.
        pack: the pack of every rank.
        gpus: number of GPUs.
        hardware: of each GPU.
        packs: minimum number of packs per step; rounded up to a multiple of the data-parallel size.
    """
    found = []
    for layout in layouts(model, gpus, hardware.gpus_per_node):
        of_rank = -(-packs // layout.data)
        padded = pack.padded_to(layout.pad_multiple)
        for recompute in SETTING:
            memory = rank_bytes(model, layout, padded, recompute, packs=of_rank)
            if memory.total > hardware.memory - hardware.reserved:
                continue
            time = StepTime.of(model, layout, padded, recompute, hardware, packs=of_rank)
            found.append(Plan(layout, recompute, of_rank * layout.data, padded.total, memory, time))
    # Of equally fast ones the simplest first.
    return sorted(found, key=lambda plan: (-round(plan.time.rate / 1e12, 1), plan.layout.replica))


def best_plans(
    model: WanConfig, pack: PackLayout, gpus: int, hardware: Hardware, packs: int, count: int = 1
) -> list[Plan]:
    """The fastest layouts that fit, at least one.

    Raises:
        ValueError: no layout fits.
    """
    found = candidates(model, pack, gpus, hardware, packs)
    if not found:
        raise ValueError(
            f"no layout of {gpus} GPUs of {hardware.memory / 1e9:.0f} GB fits this model with packs of {pack.total:,} "
            "tokens; use more GPUs or a smaller --capacity"
        )
    return found[:count]


def entry(plan: Plan, hardware: Hardware) -> dict[str, Any]:
    """The values of ``--json``."""
    return {
        "layout": {**dataclasses.asdict(plan.layout), "data": plan.layout.data},
        "recompute": plan.recompute,
        "packs": plan.packs,
        "capacity": plan.capacity,
        "memory": {**dataclasses.asdict(plan.memory), "total": plan.memory.total},
        "seconds": {**dataclasses.asdict(plan.time), "total": plan.time.total},
        "tflops_per_gpu": plan.time.rate / 1e12,
        "mfu": plan.time.rate / hardware.peak,
        "settings": plan.settings(),
    }


HEADER = "| GPUs | data | tensor | context | pipeline | FSDP | recompute | packs | GB | s/step | TFLOP/s/GPU | MFU |"


def table(plans: list[Plan], hardware: Hardware) -> list[str]:
    """A Markdown table, one line per plan."""
    lines = [HEADER, "|" + "---|" * (HEADER.count("|") - 1)]
    for plan in plans:
        layout, time = plan.layout, plan.time
        cells = [
            layout.world, layout.data, layout.tensor, layout.context, layout.pipeline,
            "yes" if layout.fully_sharded else "no", SETTING[plan.recompute].replace("null", "none"), plan.packs,
            f"{plan.memory.total / 1e9:.1f}", f"{time.total:.2f}", f"{time.rate / 1e12:.0f}",
            f"{time.rate / hardware.peak:.0%}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return lines


def _start(gpus: int, machine: int, recipe: str) -> list[str]:
    """The command that starts a run: itself all processes of a machine, or on each of several machines by torchrun."""
    command = ["wan-train", "pretrain", "--recipe", recipe]
    if gpus > machine:
        nodes = ["torchrun", "--nnodes", str(gpus // machine), "--nproc-per-node", str(machine)]
        command = [*nodes, "--rdzv-backend", "c10d", "--rdzv-endpoint", "HOST:29500", "--no-python", *command]
    elif gpus > 1:
        command += ["--nproc-per-node", str(gpus)]
    # The recipes' default is 0, which leaves a model without an unconditional branch for guidance.
    return [*command, "dataset.path=DATASET", "checkpoint.save=CHECKPOINTS", "model.flow.caption_dropout=0.1"]


def main(
    *,
    model: str,
    gpus: Sequence[int],
    gpu: str,
    shape: str,
    capacity: int,
    packs: int | None,
    best: int,
    as_json: bool,
) -> list[str]:
    """The lines to print.

    Raises:
        ValueError: an invalid shape or GPU, or no layout fits.
    """
    match = re.fullmatch(r"(\d+)[x*](\d+)[x*](\d+)", shape)
    if match is None:
        raise ValueError(f"--shape is {shape!r}; expected FRAMESxHEIGHTxWIDTH, such as 81x480x832")
    frames, height, width = map(int, match.groups())
    hardware, config = Hardware.find(gpu), MODELS[model]
    pack = pack_of(config, (frames, height, width), capacity)
    plans = [
        plan
        for number in gpus or DEFAULT_GPUS
        for plan in best_plans(config, pack, number, hardware, packs or max(8, number // 8), best)
    ]
    if as_json:
        return [json.dumps([entry(plan, hardware) for plan in plans], indent=1)]
    lines = [
        f"Wan 2.1 {model}, bf16, packs of {pack.total:,} tokens ({pack.num_samples} x {frames} frames of "
        f"{height} x {width}), {hardware.name} with {hardware.memory / 1e9:.0f} GB, "
        f"{hardware.reserved / 1e9:.0f} GB of it reserved",
        "",
        *table(plans, hardware),
    ]
    if len(plans) == 1:
        lines += [
            "",
            " ".join([*_start(plans[0].layout.world, hardware.gpus_per_node, RECIPES[model]), *plans[0].settings()]),
        ]
    return lines
