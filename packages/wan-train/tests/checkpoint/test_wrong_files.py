"""What a checkpoint or its folder has in the wrong form, or cannot have, ends a run with a sentence that names it."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import RUN_OPTIONS, read_log, refused, rewrite, run, same_weights, sentence_of, stopped_after, train
from warm_ranks import Call

from wan_train.checkpoint.file_checks import check_file_contents, read_loader_state
from wan_train.checkpoint.folder import ResumePoint, find_resume_point, step_folder
from wan_train.checkpoint.record import RECORD_NAME, DamagedCheckpointError

STATE, LOADER, STRATEGY = "train_state.pt", "train_dataloader_dprank000.pt", "metadata.json"
OF_LOADER = {"rank": 0, "ranks": 1, "drawn": 4}


def _without(key: str) -> Callable[[Any], Any]:
    return lambda content: {name: value for name, value in content.items() if name != key}


# The file, its content or what makes it of the one that is there, and what is said about it.
WRONG: dict[str, tuple[str, Any, str]] = {
    "another strategy": (STRATEGY, '{"sharded_backend": "zarr"}', "it names the format 'zarr', expected 'torch_dist'"),
    "another common format": (
        STRATEGY, '{"sharded_backend": "torch_dist", "common_backend": "x"}', "the format 'x', expected 'torch'",
    ),
    "a list for a strategy": (STRATEGY, "[]", "TypeError"),
    "brackets": (STRATEGY, "[" * 60_000, "metadata.json has over 2,048 lists and objects"),
    "no JSON": (STRATEGY, "{", "metadata.json is not JSON: Expecting property name"),
    "a large strategy": (STRATEGY, " " * 70_000, "metadata.json has 70,000 bytes; expected at most 65,536"),
    "a state without a key": (STATE, _without("consumed_train_samples"), "KeyError: 'consumed_train_samples'"),
    "a list for a state": (STATE, [1], "expected a mapping of single numbers"),
    "a state of another step": (STATE, lambda state: {**state, "step": torch.tensor(7)}, "it is of step 7, expected 2"),
    "a state with a tensor": (STATE, lambda state: {**state, "step": torch.zeros(3)}, "a mapping of single numbers"),
    "a state that is none": (STATE, "no archive", "it cannot be read"),
}  # fmt: skip
OF_LOADERS: dict[str, tuple[Any, str]] = {
    "without a key": ({"a": 1}, "KeyError: 'dataloader_state_dict'"),
    "a list": ([1], "TypeError"),
    "a list inside": ({"dataloader_state_dict": [1]}, "the loader's state is no mapping"),
    "without the loader": ({"dataloader_state_dict": OF_LOADER}, "KeyError: 'loader'"),
}


@pytest.fixture
def point(one_process_run: Path, tmp_path: Path) -> ResumePoint:
    found = find_resume_point(stopped_after(2, one_process_run, tmp_path / "run"))
    assert found is not None
    return found


def _change(point: ResumePoint, name: str, content: Any) -> None:
    if callable(content):
        content = content(torch.load(point.step_folder / name, weights_only=True))
    rewrite(point.step_folder, name, content)


def _restore(saved: Any) -> None:
    """Of the loop's counters, as Megatron-Bridge does."""
    for name in ("step", "consumed_train_samples"):
        saved[name].item()


@pytest.mark.parametrize("case", WRONG)
def test_a_file_of_the_wrong_form_is_named(case: str, point: ResumePoint) -> None:
    name, content, reason = WRONG[case]
    check_file_contents(point, _restore)
    _change(point, name, content)
    with pytest.raises(ValueError, match="does not hold what a checkpoint does") as error:
        check_file_contents(point, _restore)
    said = str(error.value)
    assert said.startswith(f"{point.step_folder / name} does not hold")
    assert reason in said
    assert said.endswith(f"delete {point.step_folder} to resume from the checkpoint before it")


@pytest.mark.parametrize("case", OF_LOADERS)
def test_a_loader_state_of_the_wrong_form_is_named(case: str, point: ResumePoint) -> None:
    content, reason = OF_LOADERS[case]
    _change(point, LOADER, content)
    with pytest.raises(ValueError, match="does not hold what a checkpoint does") as error:
        read_loader_state(point, 0)
    assert str(error.value).startswith(f"{point.step_folder / LOADER} does not hold")
    assert reason in str(error.value)


def test_a_pipe_in_place_of_a_file_is_not_waited_for(point: ResumePoint) -> None:
    for name in (LOADER, RECORD_NAME):
        content = (point.step_folder / name).read_bytes()
        (point.step_folder / name).unlink()
        os.mkfifo(point.step_folder / name)
        with pytest.raises(DamagedCheckpointError, match=f"{name} is a named pipe; expected a file"):
            find_resume_point(point.folder)
        if name == LOADER:
            with pytest.raises(ValueError, match="is a named pipe; expected a file"):
                read_loader_state(point, 0)
        (point.step_folder / name).unlink()
        (point.step_folder / name).write_bytes(content)
    (point.step_folder / RECORD_NAME).write_text("[" * 100_000)
    with pytest.raises(DamagedCheckpointError, match="is nested more than 100 levels deep"):
        find_resume_point(point.folder)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        (STATE, _without("consumed_train_samples"), "KeyError: 'consumed_train_samples'"),
        (
            LOADER,
            {"dataloader_state_dict": {**OF_LOADER, "loader": {"drawn": "x"}}},
            "the number of packs drawn is 'x'",
        ),
        ("common.pt", [1], "does not hold what a checkpoint does"),
        ("common.pt", _without("optimizer"), "does not hold what a checkpoint does (KeyError: 'optimizer')"),
        ("run_config.yaml", "model: 3\n", "run_config.yaml lacks model.transformer"),
    ],
)
def test_a_run_ends_before_a_step(name: str, content: Any, reason: str, point: ResumePoint) -> None:
    if not (point.step_folder / name).exists():
        pytest.skip(f"this version of Megatron-Core writes no {name}")
    _change(point, name, content)
    said = refused(point.folder)
    assert reason in said
    assert str(point.step_folder) in said
    assert len(read_log(point.folder)) == 2


@pytest.mark.parametrize("limit", [90_000, 600_000])
def test_a_full_disk_in_an_asynchronous_save_is_a_sentence(
    limit: int, point: ResumePoint, one_process_run: Path
) -> None:
    """RLIMIT_FSIZE, above the log, stands for a disk that fills up; the save before is resumed to the bit."""
    settings = ("checkpoint.save_interval=2", "checkpoint.async_save=true")
    calls = [Call("resource:setrlimit", [resource.RLIMIT_FSIZE, [limit, limit]])]
    said = sentence_of(run((*RUN_OPTIONS, *settings), point.folder, calls=calls))
    # The error of a save is found while the next one is prepared, or written.
    step = 4 if "step 4 could" in said else 6
    assert f"step {step} could not be written to {step_folder(point.folder, step)}: [Errno 27] File too large" in said
    found = find_resume_point(point.folder)
    assert found is not None
    assert 2 <= found.step < step
    if limit == 90_000:
        train(point.folder, *settings)
        assert same_weights(point.folder, one_process_run, 6)


def test_a_full_standard_output_is_a_sentence(point: ResumePoint) -> None:
    said = sentence_of(run(RUN_OPTIONS, point.folder, calls=[Call("rank_calls:fill_output")]))
    assert said == "cannot read or write standard output: No space left on device"
    found = find_resume_point(point.folder)
    assert found is not None
    assert found.step == 2


def test_training_goes_on_where_nobody_reads_its_output(point: ResumePoint, one_process_run: Path) -> None:
    ended = run((*RUN_OPTIONS, "--verbose"), point.folder, calls=[Call("rank_calls:close_output")])
    assert ended.codes == [0], ended.errors
    assert "BrokenPipeError" not in ended.errors
    assert [entry["step"] for entry in read_log(point.folder) if "loss" in entry][-4:] == [3, 4, 5, 6]
    assert same_weights(point.folder, one_process_run, 6)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = refused(tmp_path / "file")
    assert said.startswith(f"checkpoint.save is {tmp_path / 'file'}, which cannot be written: File exists; choose")
    (tmp_path / "run" / "log.jsonl").mkdir(parents=True)
    said = refused(tmp_path / "run")
    assert f"which cannot be written: Is a directory ({tmp_path / 'run' / 'log.jsonl'})" in said
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run" / "megatron-rank0.log").mkdir(parents=True)
    said = refused(tmp_path / "run")
    assert f"which cannot be written: Is a directory ({tmp_path / 'run' / 'megatron-rank0.log'})" in said
    (tmp_path / "run" / "megatron-rank0.log").rmdir()
    os.mkfifo(tmp_path / "run" / "log.jsonl")
    assert f"which cannot be written: No plain file ({tmp_path / 'run' / 'log.jsonl'})" in refused(tmp_path / "run")


def test_commands_end_with_a_sentence_and_without_the_warnings_of_others(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}

    def command(code: str, output: int | Any = subprocess.PIPE) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, stdout=output, stderr=subprocess.PIPE, text=True, check=False
        )
        return done.returncode, done.stderr

    main = "from wan_train.cli import main; main"
    with open("/dev/full", "w") as full:
        code, errors = command(f"{main}(['config', 'list'])", full)
    assert (code, errors) == (1, "Error: cannot read or write standard output: No space left on device\n")
    (tmp_path / "file").touch()
    code, errors = command(f"{main}(['config', 'copy', 'tiny', {str(tmp_path / 'file' / 'x.yaml')!r}])")
    assert code == 1
    assert errors.startswith("Error: cannot read or write ")
    assert "Traceback" not in errors
    # torch warns of a package on its import, in whichever process that is.
    assert command("import wan_train, torch") == (0, "")
