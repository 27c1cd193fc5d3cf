"""The curves have the log's points, whatever stands in the log."""

import json
import math
import os
from pathlib import Path

import pytest
from report_runs import entry, validation, write_run
from training_runs import read_log, steps_of

from wan_train.report.page import as_json, content_of, open_runs, render
from wan_train.report.run_folder import RunFolder
from wan_train.report.run_log import RunLog


def points(log: RunLog, key: str) -> dict[int, float]:
    curve = log.curves[key]
    return dict(zip(curve.steps, curve.values, strict=True))


def test_the_curves_of_a_real_run_are_its_log(one_process_run: Path) -> None:
    run = RunFolder(one_process_run, "run")
    written = steps_of(read_log(one_process_run))
    assert len(written) == 6
    for key in written[0].keys() - {"step"}:
        assert points(run.log, key) == {one["step"]: one[key] for one in written}, key
    assert {"loss", "grad_norm", "learning_rate", "tokens_per_second", "data_wait", "peak_memory"} < set(run.log.curves)
    assert run.saved == [2, 4, 6]
    assert run.steps_of_run == 6
    assert run.settings["optimizer.lr"] == 0.01
    assert run.settings_from == "iter_0000006"
    # Each save lasted, and is in the entry of the step after it; the last one has none.
    assert [step for step, seconds in points(run.log, "save_seconds").items() if seconds > 0] == [3, 5]
    assert all(10**8 < size < 10**12 for size in points(run.log, "peak_memory").values())


def test_validations_are_curves_by_timestep(tmp_path: Path) -> None:
    at = {"250": 2.0, "750.5": 1.0}
    log = RunLog(write_run(tmp_path, [entry(1), validation(1, at, caption_gap=3.5), entry(2, caption_gap=4.0)]))
    assert points(log, "validation.loss") == {1: 1.5}
    assert points(log, "validation.timesteps.250") == {1: 2.0}
    assert points(log, "validation.timesteps.750.5") == {1: 1.0}
    assert points(log, "validation.caption_gap") == {1: 3.5}
    assert points(log, "caption_gap") == {2: 4.0}
    assert points(log, "loss") == {1: 1.0, 2: 1.0}, "a validation's loss is another curve"


def test_steps_that_a_resumed_run_takes_again_replace_the_first_ones(tmp_path: Path) -> None:
    first = [*(entry(step, 9.0) for step in range(1, 6)), validation(4, {"500": 9.0})]
    again = [{"event": "resumed", "step": 3}, *(entry(step, 1.0) for step in range(4, 8))]
    run = RunFolder(write_run(tmp_path, [*first, *again]), "run")
    assert points(run.log, "loss") == {1: 9, 2: 9, 3: 9, 4: 1, 5: 1, 6: 1, 7: 1}
    assert "validation.loss" not in run.log.curves, "that validation was of weights that are gone"
    assert run.log.replaced == 2
    assert "trained again after a resume are left out: 2" in " ".join(run.notes())
    assert [(mark.kind, mark.step) for mark in run.marks()] == [("resume", 3)]
    assert run.content()["validation"] is None


def test_repeated_steps_without_a_resume_are_replaced_too(tmp_path: Path) -> None:
    log = RunLog(write_run(tmp_path, [entry(1, 5.0), entry(2, 5.0), entry(3, 5.0), entry(2, 1.0)]))
    assert points(log, "loss") == {1: 5.0, 2: 1.0}


def test_values_that_are_not_finite_are_gaps_and_named(tmp_path: Path) -> None:
    line = json.dumps(entry(2)).replace('"loss": 1.0', '"loss": NaN').replace('"mfu": 0.4', '"mfu": 1e999')
    run = RunFolder(write_run(tmp_path, [entry(1), line, entry(3, grad_norm=None), entry(4, tokens=10**400)]), "run")
    assert math.isnan(points(run.log, "loss")[2])
    assert run.content()["curves"]["loss"] == {"step": [1, 2, 3, 4], "value": [1.0, None, 1.0, 1.0]}
    assert list(points(run.log, "grad_norm")) == [1, 2, 4]
    notes = run.notes()
    for key, step in (("loss", 2), ("mfu", 2), ("tokens", 4)):
        assert f"{key} is not finite or beyond 1e100 at step {step}." in notes


@pytest.mark.parametrize(
    "line",
    [
        "", "{", "[1, 2]", "3", "null", "\x00", '{"loss": 1.0}', '{"step": "2", "loss": 1}', '{"step": true}',
        '{"step": -1}', '{"step": 1e3}', '{"step": 9007199254740993}', "[" * 100_000,
        '{"step": 2, "a": ' + "1" * 5000 + "}", '{"x": "' + "y" * (1 << 20),
    ],
    ids=lambda line: line[:20],
)  # fmt: skip
def test_lines_that_are_no_entries_are_left_out_and_counted(line: str, tmp_path: Path) -> None:
    run = RunFolder(write_run(tmp_path, [entry(1), line, entry(3)]), "run")
    assert list(points(run.log, "loss")) == [1, 3]
    assert run.log.unreadable == 1
    said = f"Lines of {tmp_path / 'log.jsonl'} that are no entries are left out: line 2."
    assert said in run.notes()


@pytest.mark.parametrize("key", ["seconds", "tokens", "loss", "learning_rate", "save_seconds"])
@pytest.mark.parametrize("value", [1e308, -1e308])
def test_numbers_too_large_to_be_added_up_are_gaps(key: str, value: float, tmp_path: Path) -> None:
    huge = [entry(step, **{key: value}) for step in range(2, 12)]
    folder = write_run(tmp_path, [entry(1), *huge, entry(12), validation(12, {"500": value, "900": value})])
    content = content_of(open_runs([folder]))
    as_json(content)
    (run,) = content["runs"]
    assert [one is None for one in run["curves"][key]["value"]] == [False] + [True] * 10 + [False]
    assert f"{key} is not finite or beyond 1e100 at step 2, 3, 4, 5, 6 and more." in run["notes"]
    assert run["validation"] is None
    assert render(content)


def test_bytes_that_are_no_text_are_left_out(tmp_path: Path) -> None:
    path = write_run(tmp_path, [entry(1)]) / "log.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 2, "loss": "\xff"}\n')
    assert RunLog(tmp_path).unreadable == 1


def test_a_log_is_read_while_it_is_written(tmp_path: Path) -> None:
    path = write_run(tmp_path, [entry(1)]) / "log.jsonl"
    line = json.dumps(entry(2, 7.0)) + "\n"
    log = RunLog(tmp_path)
    assert not log.read()
    for part in (line[:30], line[30:-1]):
        with path.open("a") as file:
            file.write(part)
        assert not log.read()
        assert list(points(log, "loss")) == [1]
        assert log.incomplete
    with path.open("a") as file:
        file.write("\n" + json.dumps(entry(3)) + "\n")
    assert log.read()
    assert points(log, "loss") == {1: 1.0, 2: 7.0, 3: 1.0}
    assert not log.incomplete
    assert log.unreadable == 0
    # Another run in the same folder, and then another file of the same size.
    path.write_text(json.dumps(entry(1, 4.0)) + "\n")
    assert log.read()
    assert points(log, "loss") == {1: 4.0}
    other = tmp_path / "other"
    other.write_text(json.dumps(entry(1, 6.0)) + "\n")
    os.replace(other, path)
    assert log.read()
    assert points(log, "loss") == {1: 6.0}


def test_a_run_that_has_taken_no_step_is_a_page(tmp_path: Path) -> None:
    run = RunFolder(write_run(tmp_path, []), "run")
    notes = run.notes()
    assert "The log has no step yet." in notes
    assert any("no checkpoint has been saved yet" in note for note in notes)
    content = run.content()
    assert (content["step"], content["curves"], content["smoothed"]) == (0, {}, {})


def test_more_keys_than_a_page_shows_are_said(tmp_path: Path) -> None:
    run = RunFolder(write_run(tmp_path, [entry(1, **{f"key {number}": 1 for number in range(1000)})]), "run")
    assert len(run.log.curves) == 200
    assert "The log has more keys than a page shows." in run.notes()


def test_saves_are_marked_although_their_checkpoints_are_deleted(tmp_path: Path) -> None:
    steps = [entry(step, save_seconds=0.5 if step in (3, 5, 7) else 0.0) for step in range(1, 8)]
    run = RunFolder(write_run(tmp_path, steps, {"train": {"train_iters": 20}}, saved=6), "run")
    (tmp_path / "iter_0000007").mkdir()  # being written
    run.refresh()
    marks = run.marks()
    assert [(mark.kind, mark.step) for mark in marks] == [("save", 2), ("save", 4), ("save", 6)]
    assert "after step 2, its checkpoint is no longer in the folder" in marks[0].text
    assert marks[2].text == "checkpoint in the folder"
    assert run.steps_of_run == 20


def test_a_save_between_two_entries_says_so(tmp_path: Path) -> None:
    run = RunFolder(write_run(tmp_path, [entry(10), entry(20, save_seconds=0.5)]), "run")
    assert [(mark.step, "between the steps 10 and 20" in mark.text) for mark in run.marks()] == [(10, True)]


def test_events_of_other_versions_are_listed(tmp_path: Path) -> None:
    events = [{"event": "begun", "weights_of": "step 3 in x"}, {"event": "odd", "step": 2, "level": 3, "why": "y"}]
    run = RunFolder(write_run(tmp_path, [events[0], entry(1), entry(2), events[1]]), "run")
    assert [(mark.kind, mark.step, mark.text) for mark in run.marks()] == [
        ("other", 2, "odd level 3, why y"),
        ("other", None, "begun weights_of step 3 in x"),
    ]
    assert points(run.log, "odd.level") == {2: 3.0}


def test_a_folder_without_a_log_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no log\.jsonl; expected a folder that a run has as checkpoint\.save"):
        RunLog(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        RunLog(tmp_path / "absent")
    os.mkfifo(tmp_path / "log.jsonl")
    with pytest.raises(ValueError, match="is a named pipe; expected a file"):
        RunLog(tmp_path)
