"""Training in bf16, as every recipe but the tiny one does: what is rounded, and what is not."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import AVERAGE_DECAY, FULLY_SHARDED, STEPS, read_log, read_tensors, steps_of, train

from wan_model.weights.training_checkpoint import find_checkpoint, read_training_checkpoint
from wan_train.checkpoint.folder import step_folder

BF16 = ("mixed_precision=bf16_mixed", "checkpoint.save_interval=3")
AVERAGE = f"ema.decay={AVERAGE_DECAY}"


@pytest.fixture(scope="session")
def bf16_run(once: Callable[[str, Callable[[Path], object]], Path], start_weights: Path) -> Path:
    def run(folder: Path) -> None:
        train(folder, *BF16, AVERAGE, "--init-from", str(start_weights))

    return once("bf16-run", run)


def losses(log: list[dict[str, Any]]) -> list[float]:
    return [entry["loss"] for entry in steps_of(log)]


def test_rounding_changes_the_run_by_no_more_than_rounding(bf16_run: Path, start_weights: Path, tmp_path: Path) -> None:
    exact = train(tmp_path, "--init-from", str(start_weights))
    rounded = read_log(bf16_run)
    assert losses(rounded) == pytest.approx(losses(exact), rel=1e-3)
    assert losses(rounded) != losses(exact)
    norms = [[entry["grad_norm"] for entry in steps_of(log)] for log in (rounded, exact)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)


def test_the_optimizer_keeps_what_is_rounded_away(bf16_run: Path) -> None:
    """Weights are computed with in bf16; their fp32 masters and the average are in the checkpoint beside them."""
    checkpoint = find_checkpoint(bf16_run)
    _, _, weights = read_training_checkpoint(checkpoint, dtype=None)
    masters = read_tensors(checkpoint, ("optimizer.state.param.",))
    averages = read_tensors(checkpoint, ("ema.",))
    assert set(masters) == set(averages) == set(weights)
    for key, weight in weights.items():
        assert weight.dtype == torch.bfloat16, key
        assert torch.equal(masters[key].to(torch.bfloat16), weight), key
        assert averages[key].dtype == torch.float32
    assert any(not torch.equal(masters[key], weight.float()) for key, weight in weights.items())


@pytest.mark.parametrize(
    "settings",
    [["model.tensor_model_parallel_size=2", "model.sequence_parallel=true"], [FULLY_SHARDED]],
    ids=["tensor and sequence", "fully sharded"],
)
def test_two_processes_are_as_near(settings: list[str], bf16_run: Path, start_weights: Path, tmp_path: Path) -> None:
    log = train(tmp_path, *BF16, "--init-from", str(start_weights), "--nproc-per-node", "2", *settings)
    assert losses(log) == pytest.approx(losses(read_log(bf16_run)), rel=1e-4)
    _, _, weights = read_training_checkpoint(find_checkpoint(tmp_path), dtype=None)
    # Fully sharded checkpoints hold the fp32 masters, of which the weights are made.
    stored = torch.float32 if FULLY_SHARDED in settings else torch.bfloat16
    assert {weight.dtype for weight in weights.values()} == {stored}


def test_resumes_to_the_bit(bf16_run: Path, start_weights: Path, tmp_path: Path) -> None:
    shutil.copytree(step_folder(bf16_run, 3), step_folder(tmp_path, 3))
    log = train(tmp_path, *BF16, AVERAGE, "--init-from", str(start_weights))
    assert log[0] == {"event": "resumed", "step": 3}
    assert losses(log) == losses(read_log(bf16_run))[3:]
    for prefixes in (("optimizer.state.",), ("ema.",), ("blocks.",)):
        got, wanted = (read_tensors(find_checkpoint(folder, STEPS), prefixes) for folder in (tmp_path, bf16_run))
        assert got
        assert all(torch.equal(got[key], value) for key, value in wanted.items())


def test_timesteps_reach_the_model_unrounded(engine_answers: dict[str, Any]) -> None:
    """bf16 rounds 999 to 1000; the engine's wrapper rounds whatever has no name."""
    assert engine_answers["precision"] == {
        "weights": "torch.bfloat16",
        "timesteps": [999.0, 0.1],
        "velocity": "torch.float32",
    }
