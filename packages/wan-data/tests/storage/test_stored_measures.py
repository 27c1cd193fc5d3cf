"""Frames of the clips of both ends of each measure, from a store."""

import json

import numpy as np
import pytest
from data_command import run
from made_scenes import Scene, write_frames
from object_store import Fault
from PIL import Image
from stored_datasets import prepare_stored

pytest.importorskip("cv2", reason="the extra curation is not installed")


@pytest.fixture
def measured(bucket, tiny_model, tmp_path):
    """The URLs of a dataset in the bucket and of its clips; one of them was listed by a URL from elsewhere."""
    folder, root = bucket
    for name in ("clips/a.mkv", "clips/b.mkv", "other/c.mkv"):
        write_frames(folder / name, Scene(7).frames(9, speed=float(ord(name[-5]) - ord("a"))))
    rows = [{"path": name, "caption": "A scene."} for name in ("a.mkv", "b.mkv", f"{root}/other/c.mkv")]
    (folder / "clips" / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = prepare_stored(
        tiny_model,
        *("--listing", f"{root}/clips/all.jsonl", "--output-folder", f"{root}/dataset"),
        *("--work-folder", tmp_path / "work", "--measures"),
    )
    assert done.exit_code == 0, done.output
    return root / "dataset", root / "clips"


def coloured_pictures(path):
    """The number of runs of rows with colour, and that of columns."""
    with Image.open(path) as image:
        shown = np.asarray(image.convert("RGB")).astype(int)
    coloured = shown.max(2) - shown.min(2) > 12
    return [np.count_nonzero(np.diff(coloured.any(axis).astype(int)) == 1) for axis in (1, 0)]


def test_both_ends_are_shown_from_a_store(measured, proxy, tmp_path, monkeypatch):
    dataset, clips = measured
    sheet = tmp_path / "ends.png"
    arguments = ("inspect", dataset, "--measures-png", sheet, "--video-folder", clips)
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    assert coloured_pictures(sheet) == [4, 6]
    proxy.faults[:] = [Fault("(GET|HEAD)", "b.mkv", status=403, times=10**6)]
    denied = run(*arguments)
    assert denied.exit_code == 0, denied.output
    assert "clips that could not be read (1): b.mkv: it cannot be read: looking was denied" in denied.stderr
    assert coloured_pictures(sheet)[0] == 4
    monkeypatch.setenv("WAN_DATA_STORE_PATIENCE", "0.5")
    proxy.faults[:] = [Fault("(GET|HEAD)", "b.mkv", status=503, times=10**6)]
    away = run(*arguments)
    assert away.exit_code == 1
    assert "b.mkv: looking failed" in away.output
