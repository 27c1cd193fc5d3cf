"""Nothing in a checkpoint folder is executed when a run resumes from it; stock readers run every payload."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from training_runs import RUN_OPTIONS, run, stopped_after
from warm_ranks import Call

from wan_model.testing.pickled_call import PickledCall
from wan_model.weights.training_checkpoint import read_index
from wan_train.checkpoint.folder import step_folder
from wan_train.checkpoint.record import record_file, write_record

STEP = 2


def _metadata(checkpoint: Path, marker: Path) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(PickledCall(os.system, f"touch {marker}")))


def _common(checkpoint: Path, marker: Path) -> None:
    torch.save({"iteration": PickledCall(os.system, f"touch {marker}")}, checkpoint / "common.pt")


def _train_state(checkpoint: Path, marker: Path) -> None:
    torch.save({"step": PickledCall(os.system, f"touch {marker}")}, checkpoint / "train_state.pt")


def _loader(checkpoint: Path, marker: Path) -> None:
    torch.save(
        {"dataloader_state_dict": PickledCall(os.system, f"touch {marker}")},
        checkpoint / "train_dataloader_dprank000.pt",
    )


def _object(checkpoint: Path, marker: Path) -> None:
    """A pickled object among the tensors, in place of one that is there: the random numbers' state."""
    index = read_index(checkpoint)
    name = next(name for name, entry in index.state_dict_metadata.items() if isinstance(entry, BytesStorageMetadata))
    info = next(info for place, info in index.storage_data.items() if place.fqn == name)
    payload = checkpoint / "__0_9.distcp"
    torch.save(PickledCall(os.system, f"touch {marker}"), payload)
    info.relative_path, info.offset, info.length = payload.name, 0, payload.stat().st_size
    (checkpoint / ".metadata").write_bytes(pickle.dumps(index))


def _run_config(checkpoint: Path, marker: Path) -> None:
    (checkpoint / "run_config.yaml").write_text(
        f"model: !!python/object/apply:os.system ['touch {marker}']\ncheckpoint: {{}}\n"
    )


def _target(checkpoint: Path, marker: Path) -> None:
    path = checkpoint / "run_config.yaml"
    path.write_text(path.read_text() + f"extra:\n  _target_: os.system\n  _args_: ['touch {marker}']\n")


PAYLOADS = {
    "index": _metadata, "common state": _common, "train state": _train_state, "loader state": _loader,
    "object among tensors": _object, "yaml tag": _run_config, "yaml target": _target,
}  # fmt: skip
# A target in YAML is text to whoever does not build what it names: nothing to refuse.
HARMLESS = {"yaml target"}


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_payload_is_refused_and_never_runs(payload: str, one_process_run: Path, tmp_path: Path) -> None:
    folder, marker, commands = tmp_path / "run", tmp_path / "marker", tmp_path / "commands"
    checkpoint = step_folder(stopped_after(STEP, one_process_run, folder), STEP)
    PAYLOADS[payload](checkpoint, marker)
    (checkpoint / "complete.json").unlink()
    # Whoever can write a payload can write the record to it.
    write_record(checkpoint, STEP, {file.name: record_file(file) for file in checkpoint.iterdir()})
    ended = run(
        (*RUN_OPTIONS, f"train.train_iters={STEP + 1}"), folder,
        environment={"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"},
        calls=[Call("rank_calls:note_commands", [str(commands)])],
    )  # fmt: skip
    assert not marker.exists(), "the payload ran"
    assert not commands.exists(), commands.read_text()
    if payload in HARMLESS:
        assert ended.codes == [0], ended.errors
    else:
        assert ended.codes[0] > 0
        if payload == "object among tensors":
            assert "Weights only load failed" in ended.errors, ended.errors[-3000:]
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert max(entry.get("step", 0) for entry in log) == STEP, "it trained on"


@pytest.mark.parametrize("payload", ["index", "common state", "train state", "loader state"])
def test_control_the_stock_reader_runs_it(payload: str, one_process_run: Path, tmp_path: Path) -> None:
    checkpoint, marker = tmp_path / "checkpoint", tmp_path / "marker"
    shutil.copytree(step_folder(one_process_run, STEP), checkpoint)
    PAYLOADS[payload](checkpoint, marker)
    if payload == "index":
        with pytest.raises(AttributeError, match="storage_meta"):  # of what the payload returned
            torch.distributed.checkpoint.FileSystemReader(checkpoint).read_metadata()
    else:
        name = {"common state": "common.pt", "train state": "train_state.pt"}.get(
            payload, "train_dataloader_dprank000.pt"
        )
        torch.load(checkpoint / name, weights_only=False)
    assert marker.exists()
