"""Training in bf16, as every recipe but the tiny one does: what is rounded, and what is not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_runs import (
    EQUALITY_SEED,
    EQUALITY_STEPS,
    FULLY_SHARDED,
    equality_options,
    read_log,
    read_tensors,
    steps_of,
    stopped_after,
    train,
)

from wan_model.dit.model import precision_of
from wan_model.weights.training_checkpoint import find_checkpoint, read_training_checkpoint
from wan_train.checkpoint.export import export

MASTERS = "optimizer.state.param."
BF16 = "mixed_precision=bf16_mixed"
# A loss is the mean of VALUES squared errors. On its way through two blocks a value is rounded some 30 times by at most
# 2^-9 of itself, independent of the others; squaring doubles that, and the mean divides it by the root of VALUES.
VALUES = 2 * (3 * 4 * 4 + 1 * 3 * 5 + 2 * 2 * 5) * 64
NEAR = 4 * 2 * 2**-9 * (30 / VALUES) ** 0.5


@pytest.fixture(scope="session")
def bf16_run(once: Callable[[str, Callable[[Path], object]], Path], start_weights: Path) -> Path:
    return once("bf16-run", lambda folder: train(folder, *equality_options(start_weights, EQUALITY_SEED, BF16)))


def losses(log: list[dict[str, Any]]) -> list[float]:
    return [entry["loss"] for entry in steps_of(log)]


@pytest.mark.rounding
def test_rounding_changes_the_run_by_no_more_than_rounding(bf16_run: Path, equality_reference: Path) -> None:
    exact, rounded = read_log(equality_reference), read_log(bf16_run)
    assert losses(rounded) == pytest.approx(losses(exact), rel=NEAR)
    assert losses(rounded) != losses(exact)
    norms = [[entry["grad_norm"] for entry in steps_of(log)] for log in (rounded, exact)]
    assert norms[0] == pytest.approx(norms[1], rel=4 * NEAR)  # through the backward pass as well


def test_the_optimizer_keeps_what_is_rounded_away(bf16_run: Path) -> None:
    """Weights are computed with in bf16; their fp32 masters and the average are in the checkpoint beside them."""
    checkpoint = find_checkpoint(bf16_run)
    _, _, weights = read_training_checkpoint(checkpoint, dtype=None)
    masters = read_tensors(checkpoint, (MASTERS,))
    averages = read_tensors(checkpoint, ("ema.",))
    assert set(masters) == set(averages) == set(weights)
    for key, weight in weights.items():
        assert weight.dtype == precision_of(key, torch.bfloat16), key
        assert torch.equal(masters[key].to(weight.dtype), weight), key
        assert averages[key].dtype == torch.float32
    assert any(not torch.equal(masters[key], weight.float()) for key, weight in weights.items())


def test_an_export_in_float32_has_the_weights_of_the_optimizer(bf16_run: Path, tmp_path: Path) -> None:
    export(bf16_run, tmp_path / "wide", dtype="float32")
    export(bf16_run, tmp_path / "stored")
    wide, stored = (
        load_file(tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors")
        for name in ("wide", "stored")
    )
    masters = read_tensors(find_checkpoint(bf16_run), (MASTERS,))
    assert wide.keys() == masters.keys()
    assert all(torch.equal(wide[key], value) for key, value in masters.items())
    assert {value.dtype for value in wide.values()} == {torch.float32}
    rounded = {key for key, value in stored.items() if value.dtype == torch.bfloat16}
    assert rounded
    for key, value in stored.items():
        assert torch.equal(value, wide[key].to(value.dtype)), key
    assert any(not torch.equal(stored[key].float(), wide[key]) for key in rounded)


@pytest.mark.rounding
@pytest.mark.parametrize(
    "settings",
    [["model.tensor_model_parallel_size=2", "model.sequence_parallel=true"], [FULLY_SHARDED]],
    ids=["tensor and sequence", "fully sharded"],
)
def test_two_processes_are_as_near(settings: list[str], bf16_run: Path, start_weights: Path, tmp_path: Path) -> None:
    train(tmp_path, *equality_options(start_weights, EQUALITY_SEED, BF16, "--nproc-per-node", "2", *settings))
    assert losses(read_log(tmp_path)) == pytest.approx(losses(read_log(bf16_run)), rel=NEAR)
    _, _, weights = read_training_checkpoint(find_checkpoint(tmp_path), dtype=None)
    # Fully sharded checkpoints hold the fp32 masters, of which the weights are made.
    stored = torch.float32 if FULLY_SHARDED in settings else torch.bfloat16
    assert all(weight.dtype == precision_of(key, stored) for key, weight in weights.items())


def test_resumes_to_the_bit(bf16_run: Path, start_weights: Path, tmp_path: Path) -> None:
    folder = stopped_after(2, bf16_run, tmp_path / "run")
    train(folder, *equality_options(start_weights, EQUALITY_SEED, BF16))
    assert [entry for entry in read_log(folder) if entry.get("event") == "resumed"] == [{"event": "resumed", "step": 2}]
    assert losses(read_log(folder)) == losses(read_log(bf16_run))
    for prefixes in (("optimizer.state.",), ("ema.",), ("blocks.",)):
        got, wanted = (read_tensors(find_checkpoint(one, EQUALITY_STEPS), prefixes) for one in (folder, bf16_run))
        assert got
        assert all(torch.equal(got[key], value) for key, value in wanted.items())


def test_weights_and_timesteps_that_bf16_would_spoil_reach_the_model_in_fp32(probed: dict[str, Any]) -> None:
    """bf16 rounds 999 to 1000; the engine's wrapper rounds all weights, and whatever input has no name."""
    found = probed["precision"]
    assert found["timesteps"] == [999.0, 0.1]
    assert found["velocity"] == "torch.float32"
    assert found["weights"] == {key: str(precision_of(key, torch.bfloat16)) for key in found["weights"]}
    assert {*found["weights"].values()} == {"torch.bfloat16", "torch.float32"}
