"""Preparing clips that are objects of a store, on a real server: the dataset is that of the files."""

import json
import signal
import subprocess
import sys
import time

import multistorageclient.shortcuts
import pytest
from data_command import run
from object_store import Fault
from stored_datasets import SMALL_OPTIONS, content_of, prepare_stored, upload_folder

from wan_data.sources.folder import SourceFolder
from wan_data.sources.store_folder import StoreFolder
from wan_data.storage.local_copies import LocalCopies
from wan_model.testing.processes import default_signals


def get_counts(proxy, suffix=".mkv"):
    counts = {}
    for method, path in proxy.requests:
        if method == "GET" and path.split("?")[0].endswith(suffix):
            counts[path] = counts.get(path, 0) + 1
    return counts


def test_a_folder_in_a_store_gives_the_dataset_of_the_files(bucket, proxy, clips, from_disk, tiny_model, tmp_path):
    folder, root = bucket
    upload_folder(clips, folder)
    out = tmp_path / "out"
    result = prepare_stored(tiny_model, "--video-folder", f"{root}/clips", "--output-folder", out)
    assert result.exit_code == 0, result.output
    assert content_of(out) == content_of(from_disk)
    counts = get_counts(proxy)
    assert len(counts) == 6
    assert set(counts.values()) == {1}, "each clip is downloaded once while there is room"
    assert [path for method, path in proxy.requests if method == "HEAD" and "mkv" in path] == []
    proxy.requests.clear()
    again = prepare_stored(tiny_model, "--video-folder", f"{root}/clips", "--output-folder", out)
    assert again.exit_code == 0, again.output
    assert get_counts(proxy) == {}, "the times say that nothing has changed"
    assert len(get_counts(proxy, ".jsonl")) == 2, "captions are compared once"
    proxy.requests.clear()
    assert prepare_stored(tiny_model, "--video-folder", f"{root}/clips", "--output-folder", out).exit_code == 0
    assert [path for _, path in proxy.requests if "list-type" not in path] == [
        path for _, path in proxy.requests if path.endswith("all.jsonl")
    ], "the list is read to say which of its lines name no clip"


def test_a_vanished_and_a_denied_clip_are_rejected_and_the_others_go_on(bucket, proxy, clips, tiny_model, tmp_path):
    folder, root = bucket
    upload_folder(clips, folder)
    proxy.faults[:] = [Fault("GET", "wide.mkv", status=403, times=10**6), Fault("GET", "tall.mkv", status=404)]
    out = tmp_path / "out"
    result = prepare_stored(tiny_model, "--video-folder", f"{root}/clips", "--output-folder", out)
    assert result.exit_code == 1
    assert "wide.mkv: it cannot be read: downloading was denied" in result.output
    assert "deep/tall.mkv: it cannot be read: it does not exist" in result.output
    assert "from 4 of 6 files" in result.output
    proxy.faults.clear()
    result = prepare_stored(tiny_model, "--video-folder", f"{root}/clips", "--output-folder", out)
    assert result.exit_code == 0, result.output
    assert "from 6 of 6 files" in result.output, "they are taken when they can be read"


def test_an_outage_rejects_no_clip(bucket, proxy, clips, tiny_model, tmp_path, monkeypatch):
    folder, root = bucket
    upload_folder(clips, folder)
    monkeypatch.setenv("WAN_DATA_STORE_PATIENCE", "0.5")
    proxy.faults[:] = [Fault("GET", "wide.mkv", status=503, times=10**6)]
    out = tmp_path / "out"
    result = prepare_stored(tiny_model, "--video-folder", f"{root}/clips", "--output-folder", out)
    assert result.exit_code == 1
    assert f"Error: {root}/clips/wide.mkv: downloading failed" in result.output
    assert "REJECTED" not in result.output
    assert not list(out.glob("*.tar"))


def test_clips_stay_within_the_bound_and_are_fetched_again(bucket, proxy, clips, from_disk, tiny_model, tmp_path):
    folder, root = bucket
    upload_folder(clips, folder)
    out, work, largest = tmp_path / "out", tmp_path / "work", 0
    take = LocalCopies._begin

    def seen(self, found):
        nonlocal largest
        copy = take(self, found)
        largest = max(largest, self._bytes)
        return copy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalCopies, "_begin", seen)
        result = prepare_stored(
            tiny_model,
            *("--video-folder", f"{root}/clips", "--output-folder", out, "--local-copies", "7000"),
            *("--work-folder", work),
        )
    assert result.exit_code == 0, result.output
    assert content_of(out) == content_of(from_disk)
    assert 4000 < largest <= 7000
    assert set(get_counts(proxy).values()) <= {1, 2, 3}
    assert list(work.iterdir()) == [], "the copies are gone"


def test_a_listing_in_a_store_names_objects_and_no_files(bucket, clips, tmp_path, tiny_model):
    folder, root = bucket
    upload_folder(clips, folder)
    (tmp_path / "secret.mkv").write_bytes(b"x")
    rows = [
        {"path": "clips/wide.mkv", "caption": "Relative."},
        {"path": f"{root}/clips/deep/tall.mkv", "caption": "By its URL."},
        {"path": str(tmp_path / "secret.mkv"), "caption": "Of this machine."},
        {"path": "https://KEY:TOKEN@host/a.mkv", "caption": "Of another kind."},
    ]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = run("plan", "--listing", f"{root}/list.jsonl", *SMALL_OPTIONS[:-4], "--json", "--allow-rejects")
    assert result.exit_code == 0, result.output
    assert '"accepted": 2' in result.output
    assert "line 3: a listing in a store names a path of this machine" in result.output
    assert "line 4: a URL of https:// cannot be read" in result.output
    assert "TOKEN" not in result.output


def test_verify_compares_the_clips_of_a_listing_where_they_are(bucket, proxy, clips, tiny_model, tmp_path, monkeypatch):
    folder, root = bucket
    stored, here = upload_folder(clips, folder), upload_folder(clips, tmp_path)
    rows = [
        {"path": "clips/wide.mkv", "caption": "On the disk."},
        {"path": f"{root}/clips/deep/tall.mkv", "caption": "In the store."},
    ]
    listing = tmp_path / "list.jsonl"
    listing.write_text("\n".join(map(json.dumps, rows)))
    done = prepare_stored(tiny_model, "--listing", listing, "--output-folder", tmp_path / "out")
    assert done.exit_code == 0, done.output
    arguments = ("verify", tmp_path / "out", "--sources", tmp_path, "--listing", listing)
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    assert "2 sources checked: no problems" in done.stdout
    monkeypatch.setenv("WAN_DATA_STORE_PATIENCE", "0.5")
    proxy.faults[:] = [Fault(path="tall.mkv", status=503, times=10**6)]
    assert "tall.mkv: looking failed" in run(*arguments).output
    proxy.faults.clear()
    (stored / "deep" / "tall.mkv").write_bytes((here / "wide.mkv").read_bytes())
    rows[1]["caption"] = "Another."
    listing.write_text("\n".join(map(json.dumps, rows)))
    done = run(*arguments)
    assert done.exit_code == 1
    assert f"{root}/clips/deep/tall.mkv has changed since it was encoded" in done.stdout
    assert f"{root}/clips/deep/tall.mkv has another caption" in done.stdout
    proxy.faults[:] = [Fault(path="tall.mkv", status=403, times=10**6)]
    assert "tall.mkv cannot be read: looking was denied" in run(*arguments).stdout
    proxy.faults.clear()
    with monkeypatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.delenv(name)
        patch.setenv("HOME", "/nonexistent")
        multistorageclient.shortcuts._STORAGE_CLIENT_CACHE.pop(f"_s3-{root.bucket}", None)
        refused = run(*arguments)
    multistorageclient.shortcuts._STORAGE_CLIENT_CACHE.pop(f"_s3-{root.bucket}", None)
    assert "no credentials for" in refused.output
    assert "1 sources checked: problems: 1" in refused.output, "it ends there, and is no problem of each clip"
    (stored / "deep" / "tall.mkv").unlink()
    assert f"{root}/clips/deep/tall.mkv cannot be read: it does not exist" in run(*arguments).stdout


def test_what_of_a_store_is_not_read_is_named(bucket, proxy, clips):
    folder, root = bucket
    upload_folder(clips, folder)
    for name in (".hidden/a.mkv", "notes.doc", "alone.txt", "still.png"):
        (folder / "clips" / name).parent.mkdir(exist_ok=True)
        (folder / "clips" / name).write_bytes(b"x")
    (folder / "clips" / "more.jsonl").write_text('{"path": "nobody.mkv", "caption": "x"}\n')
    stored, here = StoreFolder(root / "clips"), SourceFolder(folder / "clips")
    assert [one.name for one in stored.files()] == [one.name for one in here.files()]
    lines = [line.replace(".hidden/a.mkv", ".hidden") for line in stored.left_out()]
    assert lines == here.left_out()


def test_an_interruption_ends_at_once_although_a_transfer_stalls(bucket, proxy, clips, tiny_model, tmp_path):
    folder, root = bucket
    upload_folder(clips, folder)
    proxy.faults[:] = [Fault("GET", "wide.mkv", cut=100, stall=600.0)]
    code = "from wan_data.cli import main; main()"
    options = ("--video-folder", f"{root}/clips", "--output-folder", tmp_path / "out", "--work-folder", tmp_path / "w")
    command = [sys.executable, "-c", code, "prepare", "--model", tiny_model, *SMALL_OPTIONS, *options]
    with (
        default_signals(signal.SIGINT),
        subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process,
    ):
        while not proxy.count("GET", "wide.mkv") and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=200)[1].decode()
    assert process.returncode == 130, said
    assert "the same command goes on" in said
    assert list((tmp_path / "w").iterdir()) == [], "the copies are gone"
