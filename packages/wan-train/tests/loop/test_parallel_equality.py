"""Two and four gloo processes, in every layout, against one process: the table of what is equal.

The runs go through the real command line and Megatron-Bridge's own loop, six steps from weights whose every gradient is
alive, on packs that mix three shapes and, under sequence and context parallelism, need padding. Compared are the
losses and gradient norms of all steps, every gradient of the first step, the trained weights, their average, and a
validation in the middle. That the one process is right is for test_plain_training.py.

With WAN_EQUALITY_TABLE=FILE in the environment each case adds the differences that it measured to that file.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import (
    AVERAGE_DECAY,
    FULLY_SHARDED,
    STEPS,
    read_log,
    read_tensors,
    steps_of,
    train_for_equality,
)

from wan_model.config import WanConfig
from wan_model.tiny import TINY_CONFIG
from wan_model.weights.training_checkpoint import find_checkpoint, read_training_checkpoint
from wan_model.weights.transformer import expected_shapes, load_transformer

TENSOR = "model.tensor_model_parallel_size=2"
SEQUENCE = "model.sequence_parallel=true"
CONTEXT = "model.context_parallel_size=2"
PIPELINE = "model.pipeline_model_parallel_size=2"
OVERLAP = ("ddp.overlap_grad_reduce=true", "ddp.overlap_param_gather=true")
# Processes, and what they are given; data parallelism takes the rest.
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "data": (2, []),
    "data, communication overlapped": (2, [*OVERLAP]),
    "fully sharded": (2, [FULLY_SHARDED]),
    "tensor": (2, [TENSOR]),
    "tensor and sequence": (2, [TENSOR, SEQUENCE]),
    "tensor and sequence, recomputing": (2, [TENSOR, SEQUENCE, "model.recompute_granularity=selective"]),
    "context": (2, [CONTEXT]),
    "pipeline": (2, [PIPELINE]),
    "data x tensor": (4, [TENSOR, SEQUENCE]),
    "data x context": (4, [CONTEXT]),
    "data x pipeline": (4, [PIPELINE]),
    "fully sharded x tensor": (4, [FULLY_SHARDED, TENSOR, SEQUENCE]),
    "fully sharded x context": (4, [FULLY_SHARDED, CONTEXT]),
    "tensor x context": (4, [TENSOR, SEQUENCE, CONTEXT]),
    "tensor x pipeline": (4, [TENSOR, SEQUENCE, PIPELINE]),
    "context x pipeline": (4, [CONTEXT, PIPELINE]),
}
# The first moment after the first step is (1 - beta1) times the gradient, clipped alike everywhere.
FIRST_MOMENT = ("optimizer.state.exp_avg.", "optimizer.state.module.module.dit.")
TOLERANCE = {"loss": 1e-5, "norm": 1e-4, "gradient": 1e-4, "weight": 1e-3, "average": 1e-3, "validation": 1e-5}


def weights(folder: Path, step: int = STEPS) -> tuple[WanConfig, dict[str, torch.Tensor]]:
    config, _, state = read_training_checkpoint(find_checkpoint(folder, step), device="cpu", dtype=torch.float32)
    return config, state


def weights_at_start(start: Path) -> dict[str, torch.Tensor]:
    return {key: value.detach() for key, value in load_transformer(start / "transformer").named_parameters()}


def gradients(folder: Path) -> dict[str, torch.Tensor]:
    found = read_tensors(find_checkpoint(folder, 1), FIRST_MOMENT)
    # The fully sharded format names the moment behind the tensor.
    return {
        key.removesuffix(".exp_avg"): tensor
        for key, tensor in found.items()
        if not key.endswith((".exp_avg_sq", ".step"))
    }


def relative(got: torch.Tensor, wanted: torch.Tensor, scale: torch.Tensor | None = None) -> float:
    return float((got - wanted).norm() / (wanted if scale is None else scale).norm())


def validation_losses(folder: Path) -> list[dict[str, Any]]:
    return [entry for entry in read_log(folder) if entry.get("event") == "validation"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_one_process(layout: str, equality_reference: Path, start_weights: Path, tmp_path: Path) -> None:
    processes, settings = LAYOUTS[layout]
    train_for_equality(tmp_path, start_weights, "--nproc-per-node", str(processes), *settings)
    log, wanted_log = steps_of(read_log(tmp_path)), steps_of(read_log(equality_reference))
    assert len(log) == len(wanted_log) == STEPS
    found: dict[str, float] = {}
    pairs = list(zip(log, wanted_log, strict=True))
    found["loss"] = max(abs(got["loss"] / wanted["loss"] - 1) for got, wanted in pairs)
    found["norm"] = max(abs(got["grad_norm"] / wanted["grad_norm"] - 1) for got, wanted in pairs)
    assert [got["tokens"] for got, _ in pairs] == [wanted["tokens"] for _, wanted in pairs]

    first, wanted_first = gradients(tmp_path), gradients(equality_reference)
    assert set(first) == set(wanted_first) == set(expected_shapes(TINY_CONFIG))
    assert all(wanted.norm() > 0 for wanted in wanted_first.values()), "a gradient that is zero shows nothing"
    found["gradient"] = max(relative(first[key], wanted) for key, wanted in wanted_first.items())

    config, state = weights(tmp_path)
    assert config == TINY_CONFIG
    # Global shapes: a split parameter saved with its local shape would show here.
    assert {key: tuple(value.shape) for key, value in state.items()} == expected_shapes(TINY_CONFIG)
    _, wanted_state = weights(equality_reference)
    start = weights_at_start(start_weights)
    # Relative to how far training moved it: a gradient that is off by a factor hides behind Adam and clipping, but one
    # that misses a rank's share does not.
    found["weight"] = max(relative(state[key], wanted, wanted - start[key]) for key, wanted in wanted_state.items())

    if FULLY_SHARDED not in settings:
        average, wanted_average = (
            read_tensors(find_checkpoint(one), ("ema.",)) for one in (tmp_path, equality_reference)
        )
        assert set(average) == set(expected_shapes(TINY_CONFIG))
        found["average"] = max(
            relative(average[key], wanted, wanted - start[key]) for key, wanted in wanted_average.items()
        )

    validations, wanted_validations = validation_losses(tmp_path), validation_losses(equality_reference)
    assert [entry["step"] for entry in validations] == [3, 6]
    found["validation"] = max(
        abs(got["timesteps"][timestep] / wanted["timesteps"][timestep] - 1)
        for got, wanted in zip(validations, wanted_validations, strict=True)
        for timestep in wanted["timesteps"]
    )
    if table := os.environ.get("WAN_EQUALITY_TABLE"):
        with open(table, "a", encoding="utf-8") as file:
            file.write(json.dumps({"layout": layout, "processes": processes, **found}) + "\n")
    assert {name: value for name, value in found.items() if not value <= TOLERANCE[name]} == {}


def test_the_average_is_that_of_the_weights_after_each_step(equality_reference: Path, start_weights: Path) -> None:
    expected = weights_at_start(start_weights)
    for step in range(1, STEPS + 1):
        _, state = weights(equality_reference, step)
        expected = {
            key: AVERAGE_DECAY * average + (1 - AVERAGE_DECAY) * state[key] for key, average in expected.items()
        }
        saved = read_tensors(find_checkpoint(equality_reference, step), ("ema.",))
        assert all(torch.allclose(saved[key], average, rtol=1e-5, atol=1e-7) for key, average in expected.items())


def test_packs_count_their_padding_and_their_operations(equality_reference: Path) -> None:
    first = read_log(equality_reference)[0]
    assert first["tokens"] == first["tokens_padded"] == 2 * (3 * 4 * 4 + 1 * 3 * 5 + 2 * 2 * 5)
    assert first["packing_efficiency"] == 1.0
    assert first["tflops_per_device"] == pytest.approx(first["flops"] / first["seconds"] / 1e12)
