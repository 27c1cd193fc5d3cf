"""A run that was stopped and resumed is the uninterrupted run, to the bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from training_runs import (
    BASE_OPTIONS,
    RUN_OPTIONS,
    STEPS,
    data_options,
    read_log,
    refused_on,
    rewrite,
    steps_of,
    train,
    train_on,
    wan_train,
    write_dataset,
)

from wan_model.tiny import write_tiny_wan
from wan_model.weights.training_checkpoint import find_checkpoint, read_training_checkpoint
from wan_train.checkpoint.export import export

Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def stopped_run(once: Once) -> Path:
    """Stopped after the third of six steps."""
    return once("stopped-run", lambda folder: train(folder, "train.exit_interval=3"))


def test_resumed_equals_uninterrupted_to_the_bit(stopped_run: Path, one_process_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "resumed"
    shutil.copytree(stopped_run, folder)
    log = train(folder, "checkpoint.save_interval=3")
    assert [entry for entry in log if "event" in entry] == [{"event": "resumed", "step": 3}]
    steps, reference = steps_of(log), steps_of(read_log(one_process_run))
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "grad_norm", "learning_rate"):
        assert [float(entry[name]).hex() for entry in steps] == [float(entry[name]).hex() for entry in reference]
    _, _, got = read_training_checkpoint(find_checkpoint(folder), device="cpu", dtype=torch.float32)
    _, _, wanted = read_training_checkpoint(find_checkpoint(one_process_run), device="cpu", dtype=torch.float32)
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)


def test_resumes_in_other_layouts_of_the_model(one_process_run: Path, tmp_path: Path) -> None:
    """Two steps each: over two tensor-parallel ranks, over two stages, alone."""
    two = ("--nproc-per-node", "2")
    tensor = (*two, "model.tensor_model_parallel_size=2", "model.sequence_parallel=true")
    pipeline = (*two, "model.pipeline_model_parallel_size=2")
    for settings in ((*tensor, "train.exit_interval=2"), (*pipeline, "train.exit_interval=4"), ()):
        log = train(tmp_path, *settings)
    assert [entry["step"] for entry in log if "event" in entry] == [2, 4]
    steps, reference = steps_of(log), steps_of(read_log(one_process_run))
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4, 5, 6]
    for name, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
        assert [entry[name] for entry in steps] == pytest.approx([entry[name] for entry in reference], rel=tolerance)


def test_forgetting_where_the_data_was_would_show(stopped_run: Path, one_process_run: Path, tmp_path: Path) -> None:
    """Control: with the loader set back to the start, the losses after the resume differ."""
    folder = tmp_path / "resumed"
    shutil.copytree(stopped_run, folder)
    name = "train_dataloader_dprank000.pt"
    saved = torch.load(folder / "iter_0000003" / name, weights_only=True)
    saved["dataloader_state_dict"]["loader"]["drawn"] = 0
    rewrite(folder / "iter_0000003", name, saved)
    losses = [entry["loss"] for entry in train(folder) if "loss" in entry]
    assert losses[3:] != [entry["loss"] for entry in read_log(one_process_run)][3:]


def test_a_checkpoint_without_loader_state_is_refused(stopped_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "resumed"
    shutil.copytree(stopped_run, folder)
    (folder / "iter_0000003" / "train_dataloader_dprank000.pt").unlink()
    done = wan_train(*RUN_OPTIONS, f"checkpoint.save={folder}")
    assert done.returncode == 2
    assert "train_dataloader_dprank000.pt is missing, which complete.json names" in done.stderr
    assert len(read_log(folder)) == 3, "no step was taken"


def test_another_data_parallel_size_is_refused_before_a_step(stopped_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "resumed"
    shutil.copytree(stopped_run, folder)
    done = wan_train(*RUN_OPTIONS, f"checkpoint.save={folder}", "--nproc-per-node", "2")
    assert done.returncode == 2
    assert "resume with the data-parallel size that" in done.stderr
    assert len(read_log(folder)) == 3, "no step was taken"


def test_fully_sharded_resumes_to_the_bit(tmp_path: Path) -> None:
    options = ["--nproc-per-node", "2", "dist.use_megatron_fsdp=true", "checkpoint.save_interval=3"]
    whole = train(tmp_path / "whole", *options)
    train(tmp_path / "cut", *options, "train.exit_interval=3")
    log = steps_of(train(tmp_path / "cut", *options))
    assert [(entry["loss"], entry["grad_norm"]) for entry in log] == [
        (entry["loss"], entry["grad_norm"]) for entry in whole
    ]
    states = [
        read_training_checkpoint(find_checkpoint(tmp_path / name), device="cpu", dtype=torch.float32)[2]
        for name in ("whole", "cut")
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_signal_ends_a_run_in_order(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from wan_train.cli import main; main()", "pretrain", *RUN_OPTIONS]
    settings = ["train.train_iters=100000", f"checkpoint.save={tmp_path}", "train.exit_signal_handler=true"]
    with subprocess.Popen([*command, *settings], stdout=subprocess.DEVNULL) as launcher:
        while not (tmp_path / "log.jsonl").exists():
            assert launcher.poll() is None
            time.sleep(0.05)
        (worker,) = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        os.kill(int(worker), signal.SIGTERM)
        assert launcher.wait(120) == 0
    done = read_log(tmp_path)[-1]["step"]
    assert done < 100000
    assert find_checkpoint(tmp_path).name == f"iter_{done:07d}"


def test_going_back_in_a_folder_with_later_steps_is_refused(one_process_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(one_process_run, folder)
    done = wan_train(*RUN_OPTIONS, f"checkpoint.save={folder}", "checkpoint.ckpt_step=3")
    assert done.returncode == 2
    assert "step 3 was asked for" in done.stderr
    other = tmp_path / "other"
    log = train(other, f"checkpoint.load={folder}", "checkpoint.ckpt_step=3")
    assert [entry["loss"] for entry in steps_of(log)] == [entry["loss"] for entry in steps_of(read_log(folder))[3:]]


def test_loading_from_where_a_run_saves_starts_it_and_goes_on(one_process_run: Path, tmp_path: Path) -> None:
    """As the tutorial has it; the first time there is nothing to load."""
    settings = (f"checkpoint.load={tmp_path}", "checkpoint.save_interval=3")
    assert len(train(tmp_path, *settings, "train.exit_interval=3")) == 3
    log = train(tmp_path, *settings)
    assert [entry["step"] for entry in log if "event" in entry] == [3]
    assert [entry["loss"] for entry in steps_of(log)] == [entry["loss"] for entry in read_log(one_process_run)]


def test_a_mistyped_load_path_is_refused(tmp_path: Path) -> None:
    done = wan_train(*RUN_OPTIONS, f"checkpoint.load={tmp_path / 'mistyped'}")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("Error: checkpoint.load is")
    assert json.dumps(str(tmp_path / "mistyped"))[1:-1] in done.stderr


def test_weights_of_another_latent_space_or_other_sizes_are_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "first")
    write_dataset(tmp_path / "second")
    shutil.rmtree(tmp_path / "second" / "model")
    write_tiny_wan(tmp_path / "second" / "model", seed=1)
    one_step = (*BASE_OPTIONS, "train.train_iters=1")
    run = tmp_path / "run"
    train_on((*one_step, *data_options(tmp_path / "first")), run)

    second = (*BASE_OPTIONS, "train.train_iters=2", *data_options(tmp_path / "second"))
    resumed = refused_on(second, run)
    assert f"the checkpoint {run / 'iter_0000001'}" in resumed
    assert "are of different latent spaces: model_id (vae-" in resumed
    assert [entry["step"] for entry in read_log(run)] == [1], "a step was taken"

    started = (*one_step, *data_options(tmp_path / "second"), "--init-from")
    assert f"the model {tmp_path / 'first' / 'model'} (fingerprint" in refused_on(
        (*started, str(tmp_path / "first" / "model")), tmp_path / "other"
    )
    assert not list((tmp_path / "other").glob("iter_*"))
    train_on((*started, str(tmp_path / "second" / "model")), tmp_path / "other")

    wider = refused_on((*RUN_OPTIONS, "model.transformer.ffn_dim=96"), run)
    assert f"{run / 'iter_0000001'} holds another transformer than this run's: ffn_dim 96 where it has" in wider


def test_a_run_begins_with_the_weights_of_another_and_resumes_its_own(one_process_run: Path, tmp_path: Path) -> None:
    """``checkpoint.finetune`` is the export of a step, given to ``--init-from``: no other state comes along."""
    begin = ("train.train_iters=4", f"checkpoint.load={one_process_run}", "checkpoint.finetune=true")
    export(one_process_run, tmp_path / "exported")
    wanted = train(tmp_path / "wanted", "train.train_iters=4", "--init-from", str(tmp_path / "exported"))
    first = train(tmp_path / "begun", *begin, "ema.decay=0.5", "train.exit_interval=2")
    assert first[0] == {"event": "begun", "weights_of": f"step {STEPS} in {one_process_run}"}
    log = train(tmp_path / "begun", *begin, "ema.decay=0.5")
    assert [entry["step"] for entry in log if "event" in entry and entry["event"] == "resumed"] == [2]
    assert [(entry["step"], entry["loss"]) for entry in steps_of(log)] == [
        (entry["step"], entry["loss"]) for entry in wanted
    ]
