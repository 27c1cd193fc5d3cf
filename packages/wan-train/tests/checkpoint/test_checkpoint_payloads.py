"""Nothing in a checkpoint folder is executed when a run resumes from it; stock readers run every payload."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from training_runs import RUN_OPTIONS, wan_train

from wan_train.checkpoint.folder import step_folder
from wan_train.checkpoint.record import record_file, write_record

Once = Callable[[str, Callable[[Path], object]], Path]
STEP = 3


class Touch:
    """Pickles as a call that leaves a marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def _metadata(checkpoint: Path, marker: Path) -> None:
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Touch(marker)))


def _common(checkpoint: Path, marker: Path) -> None:
    torch.save({"iteration": Touch(marker)}, checkpoint / "common.pt")


def _train_state(checkpoint: Path, marker: Path) -> None:
    torch.save({"step": Touch(marker)}, checkpoint / "train_state.pt")


def _loader(checkpoint: Path, marker: Path) -> None:
    torch.save({"dataloader_state_dict": Touch(marker)}, checkpoint / "train_dataloader_dprank000.pt")


def _object(checkpoint: Path, marker: Path) -> None:
    """A pickled object among the tensors, in place of one that is there: the random numbers' state."""
    script = f"""
    import pickle, sys, torch
    from pathlib import Path
    sys.path.insert(0, {str(Path(__file__).parents[1])!r})
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata
    from test_checkpoint_payloads import Touch
    from wan_model.weights.training_checkpoint import read_index
    folder = Path({str(checkpoint)!r})
    index = read_index(folder)
    name = next(name for name, entry in index.state_dict_metadata.items() if isinstance(entry, BytesStorageMetadata))
    place, info = next((place, info) for place, info in index.storage_data.items() if place.fqn == name)
    torch.save(Touch(Path({str(marker)!r})), folder / "__0_9.distcp")
    info.relative_path, info.offset, info.length = "__0_9.distcp", 0, (folder / "__0_9.distcp").stat().st_size
    with (folder / ".metadata").open("wb") as file:
        pickle.dump(index, file)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=120)


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


@pytest.fixture(scope="session")
def saved(once: Once) -> Path:
    def build(folder: Path) -> None:
        done = wan_train(*RUN_OPTIONS, f"checkpoint.save={folder}", "train.exit_interval=3")
        assert done.returncode == 0, done.stderr

    return once("saved-for-payloads", build)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_payload_is_refused_and_never_runs(payload: str, saved: Path, tmp_path: Path) -> None:
    folder, marker, hidden = tmp_path / "run", tmp_path / "marker", tmp_path / "calls"
    shutil.copytree(saved, folder)
    checkpoint = step_folder(folder, STEP)
    PAYLOADS[payload](checkpoint, marker)
    (checkpoint / "complete.json").unlink()
    # Whoever can write a payload can write the record to it.
    write_record(checkpoint, STEP, {file.name: record_file(file) for file in checkpoint.iterdir()})
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\ndef hook(event, arguments):\n    if event == 'os.system':\n"
        f"        open({str(hidden)!r}, 'a').write(repr(arguments))\nsys.addaudithook(hook)\n"
    )
    done = wan_train(
        *RUN_OPTIONS, f"checkpoint.save={folder}", f"train.train_iters={STEP + 1}",
        environment={"PYTHONPATH": str(tmp_path), "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"},
    )  # fmt: skip
    assert not marker.exists(), "the payload ran"
    assert not hidden.exists(), hidden.read_text()
    if payload in HARMLESS:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0
        if payload == "object among tensors":
            assert "Weights only load failed" in done.stderr, done.stderr[-3000:]
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert max(entry.get("step", 0) for entry in log) == STEP, "it trained on"


@pytest.mark.parametrize("payload", ["index", "common state", "train state", "loader state"])
def test_control_the_stock_reader_runs_it(payload: str, saved: Path, tmp_path: Path) -> None:
    checkpoint, marker = tmp_path / "checkpoint", tmp_path / "marker"
    shutil.copytree(step_folder(saved, STEP), checkpoint)
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
