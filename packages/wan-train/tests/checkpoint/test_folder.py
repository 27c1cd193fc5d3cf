"""Which checkpoint a run resumes from, and what it deletes; no engine."""

import json
from pathlib import Path

import pytest

from wan_model.testing.permissions import permissions_apply
from wan_train.checkpoint.folder import (
    ResumePoint,
    complete_steps,
    delete_checkpoint,
    find_resume_point,
    prune,
    saved_steps,
    step_folder,
)
from wan_train.checkpoint.record import (
    RECORD_NAME,
    DamagedCheckpointError,
    PartialCheckpointError,
    changed_files,
    read_record,
    record_file,
    write_record,
)


def save(folder: Path, step: int, *, complete: bool = True) -> Path:
    path = step_folder(folder, step)
    path.mkdir(parents=True)
    for name in ("__0_0.distcp", ".metadata", "run_config.yaml"):
        (path / name).write_bytes(f"{name} of {step}".encode())
    if complete:
        write_record(path, step, {file.name: record_file(file) for file in path.iterdir()})
    return path


def resume_point(folder: Path, step: int | None = None) -> ResumePoint:
    point = find_resume_point(folder, step)
    assert point is not None
    return point


def test_the_newest_complete_one_is_found(tmp_path: Path) -> None:
    assert find_resume_point(tmp_path / "absent") is None
    for step in (5, 10):
        save(tmp_path, step)
    save(tmp_path, 15, complete=False)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("15")  # Megatron's own word counts for nothing
    point = resume_point(tmp_path)
    assert point.step == 10
    assert saved_steps(tmp_path) == [5, 10, 15]
    assert complete_steps(tmp_path) == [5, 10]
    assert changed_files(point.step_folder, point.files, point.files) == []
    older = resume_point(tmp_path, 5)
    assert older.step == 5
    with pytest.raises(PartialCheckpointError, match="was never completed"):
        find_resume_point(tmp_path, 15)
    with pytest.raises(ValueError, match=r"no checkpoint of step 7; available steps: \[5, 10, 15\]"):
        find_resume_point(tmp_path, 7)


def test_none_complete_is_none(tmp_path: Path) -> None:
    save(tmp_path, 5, complete=False)
    assert find_resume_point(tmp_path) is None


@pytest.mark.parametrize("damage", ["shorter", "longer", "gone", "record cut", "record of another step"])
def test_a_damaged_newest_one_is_never_passed_over_in_silence(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 5)
    path = save(tmp_path, 10)
    file, record = path / "__0_0.distcp", path / RECORD_NAME
    match damage:
        case "shorter":
            file.write_bytes(file.read_bytes()[:-1])
        case "longer":
            file.write_bytes(file.read_bytes() + b"x")
        case "gone":
            file.unlink()
        case "record cut":
            record.write_bytes(record.read_bytes()[:40])
        case "record of another step":
            record.write_text(json.dumps({**json.loads(record.read_text()), "step": 11}))
    with pytest.raises(DamagedCheckpointError, match="iter_0000010 to resume from the checkpoint before it"):
        find_resume_point(tmp_path)
    delete_checkpoint(tmp_path, 10)
    point = resume_point(tmp_path)
    assert point.step == 5


def test_permissions_are_no_damage(tmp_path: Path) -> None:
    record = save(tmp_path, 10) / RECORD_NAME
    record.chmod(0)
    with (
        permissions_apply(),
        pytest.raises(ValueError, match=f"{RECORD_NAME} cannot be read: Permission denied$") as said,
    ):
        find_resume_point(tmp_path)
    assert not isinstance(said.value, DamagedCheckpointError)


def test_a_record_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    content = json.loads((path / RECORD_NAME).read_text())
    content["files"]["../outside"] = {"bytes": 1, "sha256": ""}
    (path / RECORD_NAME).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="not a file beside it"):
        read_record(path, 5)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    files = read_record(path, 5)
    for name in files:
        whole = (path / name).read_bytes()
        for place in range(len(whole)):
            (path / name).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            assert changed_files(path, files, files) == [name]
        (path / name).write_bytes(whole)
    assert changed_files(path, files, files) == []


def test_pruning_keeps_the_newest_complete_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, complete=step != 3)
    save(tmp_path, 5, complete=False)  # being written
    assert prune(tmp_path, 2) == [1, 3]
    assert saved_steps(tmp_path) == [2, 4, 5]
    assert prune(tmp_path, 0) == [2], "one is always kept"
    assert complete_steps(tmp_path) == [4]


def test_pruning_never_deletes_where_nothing_is_complete(tmp_path: Path) -> None:
    save(tmp_path, 1, complete=False)
    assert prune(tmp_path, 1) == []
    assert saved_steps(tmp_path) == [1]


def test_a_checkpoint_being_deleted_counts_as_partial_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wan_train.checkpoint.folder

    save(tmp_path, 1)
    save(tmp_path, 2)
    monkeypatch.setattr(wan_train.checkpoint.folder.shutil, "rmtree", lambda path: None)  # killed right there
    delete_checkpoint(tmp_path, 2)
    point = resume_point(tmp_path)
    assert point.step == 1
