"""A version of Megatron-Bridge that moved its functions is refused in one sentence, and never saves unsafely."""

import os
from pathlib import Path

import pytest
import torch
from training_runs import RUN_OPTIONS, call, run, sentence_of, stopped_after, train
from warm_ranks import Call

from wan_model.testing.pickled_call import PickledCall
from wan_train.checkpoint.folder import complete_steps

SETTINGS = ("train.train_iters=3", "checkpoint.save_interval=2")
PAIRS = "use a pair that it knows (Megatron-Bridge 0.3 with Megatron-Core 0.16"


def refused_with(change: str, folder: Path, *settings: str, arguments: tuple[str, ...] = ()) -> str:
    calls = [Call(f"engine_changes:{change}", arguments)]
    said = sentence_of(run((*RUN_OPTIONS, *SETTINGS, *settings), folder, calls=calls))
    assert len(said.splitlines()) == 1, said
    assert said.startswith("Megatron-Bridge "), said
    assert " with Megatron-Core " in said
    assert PAIRS in said
    return said


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("saves_under_another_name", "save_checkpoint_and_time"),
        ("saves_from_another_module", "does not call megatron.bridge.training.checkpointing:save_checkpoint"),
    ],
)
def test_a_loop_that_saves_in_another_way_is_refused_before_the_first_step(
    change: str, sentence: str, tmp_path: Path
) -> None:
    said = refused_with(change, tmp_path)
    assert sentence in said
    assert "which wan-train relies on for saves that a crash cannot damage" in said
    assert not list(tmp_path.glob("iter_*"))
    assert not (tmp_path / "log.jsonl").exists()


@pytest.mark.parametrize(
    ("module", "name", "purpose"),
    [
        ("checkpointing", "save_checkpoint", "saves that a crash cannot damage"),
        ("checkpointing", "schedule_async_save", "saves that a crash cannot damage"),
        ("checkpointing", "cleanup_old_non_persistent_checkpoint", "saves that a crash cannot damage"),
        ("checkpointing", "load_checkpoint", "an exact resume"),
        ("checkpointing", "_load_model_state_dict", "an exact resume"),
        ("setup", "checkpoint_exists", "an exact resume"),
    ],
)
def test_a_function_that_is_gone_is_named(module: str, name: str, purpose: str, tmp_path: Path) -> None:
    said = refused_with("has_lost", tmp_path, arguments=(module, name))
    assert name in said
    assert f"relies on for {purpose}" in said
    assert not list(tmp_path.glob("iter_*"))


def test_a_save_that_passes_by_the_hook_writes_nothing(tmp_path: Path) -> None:
    said = refused_with("saves_past_the_hook_after_placing", tmp_path)
    assert "it writes a checkpoint outside of save_checkpoint" in said
    assert not list(tmp_path.glob("iter_*/*.distcp"))
    assert not list(tmp_path.glob("latest_*"))


def test_a_step_that_should_have_been_saved_is_missed_before_the_next(tmp_path: Path) -> None:
    said = refused_with("saves_nothing_after_placing", tmp_path, "train.train_iters=9")
    assert "its loop did not save step 2 by save_checkpoint" in said
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 2


def test_the_last_step_is_missed_at_the_end(tmp_path: Path) -> None:
    said = refused_with("saves_nothing_after_placing", tmp_path, "train.train_iters=1", "train.exit_interval=1")
    assert "its loop did not save step 1 by save_checkpoint" in said


def test_an_asynchronous_save_that_nothing_completes_is_refused(tmp_path: Path) -> None:
    said = refused_with("schedules_past_the_hook_after_placing", tmp_path, "checkpoint.async_save=true")
    assert "save_checkpoint does not call schedule_async_save" in said
    assert not complete_steps(tmp_path)


def test_a_resume_that_loads_nothing_takes_no_step(one_process_run: Path, tmp_path: Path) -> None:
    folder = stopped_after(2, one_process_run, tmp_path / "run")
    said = refused_with("loads_nothing_after_placing", folder)
    assert "its loop does not load the checkpoint by load_checkpoint" in said
    assert len((folder / "log.jsonl").read_text().splitlines()) == 2


def test_a_checkpoint_that_core_cannot_read_is_one_sentence(one_process_run: Path, tmp_path: Path) -> None:
    folder = stopped_after(2, one_process_run, tmp_path / "run")
    said = sentence_of(run(RUN_OPTIONS, folder, calls=[Call("engine_changes:cannot_read_the_checkpoint")]))
    assert said.startswith(f"{folder / 'iter_0000002'} cannot be loaded by Megatron-Bridge ")
    assert said.endswith("load it with the versions that it was saved with, or with newer ones")


def test_no_interval_saves_only_the_end(tmp_path: Path) -> None:
    """Nothing is missed where nothing was to be saved."""
    train(tmp_path / "end", "train.train_iters=2", "checkpoint.save_interval=null")
    assert complete_steps(tmp_path / "end") == [2]
    train(tmp_path / "never", "train.train_iters=2", "checkpoint.save_interval=0")
    assert complete_steps(tmp_path / "never") == []


def test_no_version_of_core_reads_more_than_weights(tmp_path: Path) -> None:
    torch.save({"common": PickledCall(os.system, f"touch {tmp_path / 'marker'}")}, tmp_path / "payload")
    call("engine_changes:only_weights_are_read", str(tmp_path / "payload"), str(tmp_path / "result"))
    assert (tmp_path / "result").read_text() == "UnpicklingError"
    assert not (tmp_path / "marker").exists()
