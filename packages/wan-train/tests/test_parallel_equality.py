"""Two and four gloo processes, in every layout, give one process's losses, gradient norms, weights and checkpoints.

The runs go through the real command line and Megatron-Bridge's own loop; packs mix three shapes and, under sequence
parallelism, need padding.
"""

from pathlib import Path

import pytest
import torch
from training_runs import STEPS, read_log, train

from wan_model.config import WanConfig
from wan_model.tiny import TINY_CONFIG
from wan_model.training_checkpoint import find_checkpoint, read_training_checkpoint
from wan_model.weights import expected_shapes, initial_tensor

TENSOR = "model.tensor_model_parallel_size=2"
SEQUENCE = "model.sequence_parallel=true"
CONTEXT = "model.context_parallel_size=2"
PIPELINE = "model.pipeline_model_parallel_size=2"
# Processes, and what they are given; data parallelism takes the rest.
LAYOUTS = {
    "data": (2, []),
    "tensor": (2, [TENSOR]),
    "tensor-and-sequence": (2, [TENSOR, SEQUENCE]),
    "tensor-and-sequence-recomputing": (2, [TENSOR, SEQUENCE, "model.recompute_granularity=selective"]),
    "context": (2, [CONTEXT]),
    "pipeline": (2, [PIPELINE]),
    "data x tensor": (4, [TENSOR, SEQUENCE]),
    "data x context": (4, [CONTEXT]),
    "tensor x context": (4, [TENSOR, SEQUENCE, CONTEXT]),
    "tensor x pipeline": (4, [TENSOR, SEQUENCE, PIPELINE]),
    "context x pipeline": (4, [CONTEXT, PIPELINE]),
}


def weights(folder: Path) -> tuple[WanConfig, dict[str, torch.Tensor]]:
    config, _, state = read_training_checkpoint(find_checkpoint(folder), device="cpu", dtype=torch.float32)
    return config, state


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_one_process(layout: str, one_process_run: Path, tmp_path: Path) -> None:
    processes, settings = LAYOUTS[layout]
    log = train(tmp_path, "--nproc-per-node", str(processes), "checkpoint.save_interval=100", *settings)
    reference = read_log(one_process_run)
    assert len(log) == len(reference) == STEPS
    for got, wanted in zip(log, reference, strict=True):
        assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)
        assert got["tokens"] == wanted["tokens"]

    config, state = weights(tmp_path)
    assert config == TINY_CONFIG
    # Global shapes: a split parameter saved with its local shape would show here.
    assert {key: tuple(value.shape) for key, value in state.items()} == expected_shapes(TINY_CONFIG)
    _, wanted_state = weights(one_process_run)
    for key, wanted_value in wanted_state.items():
        moved = (wanted_value - initial_tensor(key, tuple(wanted_value.shape), seed=1234)).norm()
        assert moved > 0, f"{key} was not trained"
        # Relative to how far training moved it: a gradient that is off by a factor hides behind Adam and clipping,
        # but one that misses a rank's share does not.
        assert (state[key] - wanted_value).norm() <= 1e-3 * moved, key


def test_sequence_parallel_packs_are_padded_and_the_padding_is_counted(one_process_run: Path, tmp_path: Path) -> None:
    first = read_log(one_process_run)[0]
    assert first["tokens"] == first["tokens_padded"] == 2 * (3 * 4 * 4 + 1 * 3 * 5 + 2 * 2 * 5)
