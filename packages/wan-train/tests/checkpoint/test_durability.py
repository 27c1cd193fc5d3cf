"""What counts as complete is on the disk, even after a power failure: everything is flushed before it gets its name."""

import hashlib
import os
from pathlib import Path

import pytest
from flushes import read_flushes, record_flushes
from training_runs import RUN_OPTIONS, run
from warm_ranks import Call

from wan_train.checkpoint.export import export
from wan_train.checkpoint.folder import delete_checkpoint, step_folder
from wan_train.checkpoint.record import RECORD_NAME, read_record, record_file, write_record

Events = list[tuple[str, str, str]]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the flushes of this process are recorded."""
    monkeypatch.setattr(os, "fsync", os.fsync)
    monkeypatch.setattr(os, "replace", os.replace)
    record_flushes(str(tmp_path / "events"))
    return tmp_path / "events"


def assert_named_when_flushed(recorded: Events, path: Path) -> int:
    """Its content was flushed, then it was renamed, then its folder was flushed; returns the place of the rename."""
    (place,) = [number for number, event in enumerate(recorded) if event[0] == "rename" and event[2] == str(path)]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert ("sync", recorded[place][1], digest) in recorded[:place], f"{path.name} got its name before its flush"
    assert recorded[place + 1] == ("sync", str(path.parent), ""), f"the name {path.name} was not flushed"
    return place


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_save_is_flushed_before_it_is_complete(asynchronous: bool, tmp_path: Path) -> None:
    folder, events = tmp_path / "run", tmp_path / "events"
    settings = ("train.train_iters=2", "checkpoint.save_interval=1", "checkpoint.most_recent_k=1")
    asynchronously = [f"checkpoint.async_save={str(asynchronous).lower()}"]
    calls = [Call("flushes:record_flushes", [str(events)])]
    ended = run((*RUN_OPTIONS, *settings, *asynchronously), folder, calls=calls)
    assert ended.codes == [0], ended.errors
    recorded, checkpoint = read_flushes(events), step_folder(folder, 2)
    complete = assert_named_when_flushed(recorded, checkpoint / RECORD_NAME)
    files = read_record(checkpoint, 2)
    assert set(files) == {file.name for file in checkpoint.iterdir()} - {RECORD_NAME}
    # Core has a file common.pt besides, until 0.19.
    assert {".metadata", "run_config.yaml", "train_state.pt", "train_dataloader_dprank000.pt"} < set(files)
    for name, record in files.items():
        assert ("sync", str(checkpoint / name), record.sha256) in recorded[:complete], name
    # The folder's own name, before the checkpoint before it is deleted.
    assert ("sync", str(folder), "") in recorded[complete:]
    deleted = recorded.index(("sync", str(step_folder(folder, 1)), ""), complete)
    assert ("sync", str(folder), "") in recorded[complete:deleted]


def test_a_record_is_flushed_before_it_gets_its_name(events: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    record = record_file(tmp_path / "file")
    write_record(tmp_path, 3, {"file": record})
    recorded = read_flushes(events)
    assert recorded[0] == ("sync", str(tmp_path / "file"), record.sha256)
    assert assert_named_when_flushed(recorded, tmp_path / RECORD_NAME) > 0


def test_a_deleted_checkpoint_is_incomplete_on_the_disk_first(
    events: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = step_folder(tmp_path, 3)
    folder.mkdir()
    write_record(folder, 3, {})
    before = len(read_flushes(events))

    def flushed(path: Path) -> None:
        assert not (path / RECORD_NAME).exists()
        assert read_flushes(events)[before:] == [("sync", str(path), "")]

    monkeypatch.setattr("wan_train.checkpoint.folder.shutil.rmtree", flushed)
    delete_checkpoint(tmp_path, 3)


def test_an_export_is_flushed_before_it_gets_its_names(events: Path, one_process_run: Path, tmp_path: Path) -> None:
    export(one_process_run, tmp_path / "out")
    recorded = read_flushes(events)
    files = list((tmp_path / "out" / "transformer").iterdir())
    assert {file.name for file in files} == {"config.json", "diffusion_pytorch_model.safetensors"}
    places = {file.name: assert_named_when_flushed(recorded, file) for file in files}
    # Who finds the sizes finds the weights.
    assert places["diffusion_pytorch_model.safetensors"] < places["config.json"]
