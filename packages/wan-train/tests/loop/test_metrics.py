"""What a run says: JSON lines, curves, lines for people; and that it stops on every rank before what is not finite."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from plain_training import Reference, engine_results, kept_by
from training_runs import (
    BASE_OPTIONS,
    EQUALITY_SEED,
    FULLY_SHARDED,
    RUN_OPTIONS,
    data_options,
    equality_options,
    read_log,
    read_tensors,
    refused,
    refused_on,
    run,
    steps_of,
    stopped_after,
    train,
    train_on,
    wan_train,
    write_dataset,
)

from wan_model.testing import assert_all_within, seeds
from wan_model.weights.training_checkpoint import find_checkpoint, read_training_checkpoint


def test_curves_and_lines_say_what_the_log_says(tmp_path: Path) -> None:
    board, bias = tmp_path / "board", tmp_path / "wandb"
    folder = tmp_path / "run"
    settings = (
        "--nproc-per-node", "2", "train.train_iters=4", "checkpoint.save_interval=100",
        f"logger.tensorboard_dir={board}", "logger.wandb_project=wan",
        "logger.wandb_exp_name=trial", f"logger.wandb_save_dir={bias}", "logger.log_interval=2",
        "report.peak_tflops=0.5", "validation.interval=4", "validation.samples=3", "validation.timesteps=[250, 750]",
    )  # fmt: skip
    secret = {"WANDB_MODE": "offline", "WANDB_API_KEY": "canary-key-that-nobody-may-see"}
    ended = run((*RUN_OPTIONS, *settings), folder, environment=secret)
    assert ended.codes == [0, 0], ended.errors
    log = read_log(folder)
    assert [(entry.get("event", "step"), entry["step"]) for entry in log] == [
        ("step", 2),
        ("step", 4),
        ("validation", 4),
    ]
    for entry in steps_of(log):
        assert entry["samples"] == 2 * 2 * 3, "two steps of two packs of three samples"
        assert entry["tokens_per_second"] == pytest.approx(entry["tokens"] / entry["seconds"])
        assert entry["packing_efficiency"] == entry["tokens"] / entry["tokens_padded"] == 1
        assert entry["tflops_per_device"] == pytest.approx(entry["flops"] / entry["seconds"] / 2 / 1e12)
        assert entry["mfu"] == pytest.approx(entry["tflops_per_device"] / 0.5)
        assert 0 <= entry["data_wait"] < entry["seconds"]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(board))
    events.Reload()
    rates = ("tokens_per_second", "packing_efficiency", "mfu", "data_wait", "peak_memory")
    for name in ("loss", "grad_norm", "learning_rate", *rates):
        drawn = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        assert drawn == pytest.approx({entry["step"]: entry[name] for entry in steps_of(log)}, rel=1e-6), name
    assert events.Scalars("validation/loss")[0].value == pytest.approx(log[-1]["loss"])
    assert events.Scalars("validation/caption_gap")[0].value == pytest.approx(log[-1]["caption_gap"])
    assert f"caption gap {log[-1]['caption_gap']:.3f}" in "".join(ended.output)
    assert events.Scalars("validation/loss_at_750")[0].value == pytest.approx(log[-1]["timesteps"]["750"])

    assert list(bias.glob("**/offline-run-*/*.wandb")), "no offline run was written"
    output = "".join(ended.output)
    lines = [line for line in output.splitlines() if line.startswith("step ")]
    assert [re.match(r"step (\d+)(/4)?  (loss|validation loss)", line).group(1) for line in lines] == ["2", "4", "4"]  # type: ignore[union-attr]
    assert all(word in lines[0] for word in ("grad norm", "tokens/s", "TFLOP/s/device", "MFU", "packing 100.0%", "ETA"))
    for file in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert b"canary-key" not in file.read_bytes(), f"{file} holds a secret"
    assert "canary-key" not in output + ended.errors


# The first step has the rate 0, the second throws the weights so far that the third overflows.
THROWN = ("optimizer.lr=1e30", "optimizer.min_lr=1e29", "optimizer.clip_grad=0", "checkpoint.save_interval=1")
TWO = ("--nproc-per-node", "2")
LAYOUTS: dict[str, tuple[str, ...]] = {
    "alone": (),
    "data": TWO,
    "tensor and sequence": (*TWO, "model.tensor_model_parallel_size=2", "model.sequence_parallel=true"),
    "context": (*TWO, "model.context_parallel_size=2"),
    "pipeline": (*TWO, "model.pipeline_model_parallel_size=2"),
    "fully sharded": (*TWO, FULLY_SHARDED),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_that_is_not_finite_stops_all_ranks_before_the_weights_change(layout: str, tmp_path: Path) -> None:
    said = refused_on((*RUN_OPTIONS, *LAYOUTS[layout], *THROWN), tmp_path)
    number = int(re.search(r"^the gradient's norm is \S+ at step (\d+): ", said)[1])  # type: ignore[index]
    # Every pack of the step is named, whichever rank had it.
    assert all(f"mock-{pack}-{slot}" in said for pack in (2 * number - 2, 2 * number - 1) for slot in range(3))
    assert [entry["step"] for entry in read_log(tmp_path)] == list(range(1, number))
    checkpoint = find_checkpoint(tmp_path)
    assert checkpoint.name == f"iter_{number - 1:07d}"
    _, _, saved = read_training_checkpoint(checkpoint)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in saved.values())


def test_the_command_says_once_what_is_not_finite(tmp_path: Path) -> None:
    done = wan_train(*RUN_OPTIONS, *TWO, *THROWN, f"checkpoint.save={tmp_path}")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("the gradient's norm is") == 1


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("validation.timesteps=[0]", "validation.timesteps is [0]; expected at least one number between 0 and 1000"),
        ("validation.samples=0", "validation.samples is 0; expected at least 1"),
        ("ema.decay=1.0", "ema.decay is 1.0; expected 0 for none, or a number below 1"),
        ("train.eval_iters=2", "validate with validation.interval"),
        ("validation.intervall=2", "unknown configuration key validation.intervall; the nearest known one is"),
    ],
)
def test_invalid_settings_are_refused_by_name(setting: str, said: str, tmp_path: Path) -> None:
    assert said in refused(tmp_path, setting)


def test_the_ema_starts_from_the_weights_where_a_checkpoint_has_none(one_process_run: Path, tmp_path: Path) -> None:
    folder = stopped_after(4, one_process_run, tmp_path / "run")
    train(folder, "ema.decay=0.5", "train.exit_interval=5")
    before = read_tensors(find_checkpoint(folder, 4), ("blocks.",))
    after = read_tensors(find_checkpoint(folder, 5), ("blocks.",))
    average = read_tensors(find_checkpoint(folder, 5), ("ema.blocks.",))
    assert average
    for key, value in average.items():
        # A difference, a product and a sum, each rounded by at most 2^-24 of the larger of the two.
        bound = 4 * 2**-24 * torch.maximum(before[key].abs(), after[key].abs())
        assert ((value - (before[key] + after[key]) / 2).abs() <= bound).all()
    assert json.loads((folder / "iter_0000005" / "complete.json").read_text())["step"] == 5


@pytest.mark.rounding
@pytest.mark.parametrize("seed", seeds(EQUALITY_SEED))
def test_a_validation_does_not_depend_on_how_samples_are_packed(
    seed: int, reference_of: Callable[[int], Reference], tmp_path: Path
) -> None:
    """Of mock data the capacity only decides how the samples of a validation are packed."""
    reference = reference_of(seed)
    train(tmp_path, *equality_options(reference.start, seed, "dataset.capacity=48"))
    for entry in read_log(tmp_path):
        if entry.get("event") == "validation":
            assert entry["samples"] == 7
            assert entry["loss"] == pytest.approx(sum(entry["timesteps"].values()) / 5)
    assert_all_within(engine_results(tmp_path), engine_results(reference.run), kept_by([], reference.scale))


def test_a_validation_reads_the_validation_split_and_misses_none(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    options = (*BASE_OPTIONS, *data_options(tmp_path), "train.train_iters=1", "validation.interval=1")
    log = train_on((*options, "validation.samples=null"), tmp_path / "run")
    (entry,) = [entry for entry in log if entry.get("event") == "validation"]
    assert entry["samples"] == 6
    # The model starts with a head of zeros: it predicts the same whatever the caption, after one step nearly so.
    assert entry["caption_gap"] == pytest.approx(1, abs=0.05)
    bare = tmp_path / "without"
    write_dataset(bare, val=0)
    assert "val" in refused_on((*BASE_OPTIONS, *data_options(bare), "validation.interval=1"), tmp_path / "none")
    assert not (tmp_path / "none" / "log.jsonl").exists(), "it took a step"
