"""Datasets that are written into a store, on a real server."""

import os
import shutil
import subprocess
import sys
import time

import pytest
from object_store import ACCESS_KEY, SECRET_KEY, Fault
from stored_datasets import SMALL_OPTIONS, content_of, prepare_stored, upload_folder

from wan_data.index.manifest import read_manifest
from wan_data.prepare import store_output
from wan_data.prepare.ranks import Ranks
from wan_data.prepare.store_output import StoreOutput
from wan_data.reading.datasets import splits
from wan_data.storage.store import write

COMMAND = (sys.executable, "-c", "from wan_data.cli import main; main()", "prepare")


@pytest.fixture
def places(bucket, clips, tmp_path, monkeypatch):
    """The folder of a bucket with clips, the options to prepare them within it, and the folder of the dataset."""
    folder, root = bucket
    upload_folder(clips, folder)
    options = ("--video-folder", f"{root}/clips", "--output-folder", f"{root}/out", "--work-folder", tmp_path / "work")
    return folder, options, folder / "out"


def test_from_a_store_into_a_store_is_the_same_as_on_a_disk(places, from_disk, tiny_model, proxy):
    _, options, out = places
    result = prepare_stored(tiny_model, *options)
    assert result.exit_code == 0, result.output
    assert f"{options[3]}\n" in result.output
    assert content_of(out) == content_of(from_disk)
    assert not list(options[5].rglob("*.tar")), "no shard stays on the disk"
    proxy.requests.clear()
    again = prepare_stored(tiny_model, *options)
    assert again.exit_code == 0, again.output
    assert proxy.count("PUT", "/out/") <= 1, "the times alone"
    assert content_of(out) == content_of(from_disk)


def change(clips, clip):
    """Add a clip, change one, and remove one."""
    clip(clips / "a new one.mkv", range(100, 118), size=(48, 64))
    (clips / "a new one.txt").write_text("New.\n")
    clip(clips / "many" / "clip 1.v1.mkv", range(18, 36), size=(48, 48))
    (clips / "deep" / "tall.mkv").unlink()
    (clips / "deep" / "tall.jsonl").unlink()


def test_clips_are_added_changed_and_removed_as_on_a_disk(places, from_disk, clips, clip, tiny_model, tmp_path):
    folder, options, out = places
    assert prepare_stored(tiny_model, *options).exit_code == 0
    changed = shutil.copytree(clips, tmp_path / "clips")
    change(changed, clip)
    change(folder / "clips", clip)
    disk = shutil.copytree(from_disk, tmp_path / "disk")
    more = ("--update", "--remove-missing")
    expected = prepare_stored(tiny_model, "--video-folder", changed, "--output-folder", disk, *more)
    assert expected.exit_code == 0, expected.output
    shutil.rmtree(tmp_path / "work")  # as on another machine
    result = prepare_stored(tiny_model, *options, *more)
    assert result.exit_code == 0, result.output
    assert content_of(out) == content_of(disk)
    assert {path.name for path in out.iterdir()} == {path.name for path in disk.iterdir()}, "nothing is left over"


def test_a_run_that_is_killed_at_any_upload_goes_on(places, from_disk, tiny_model, proxy, length):
    _, options, out = places
    command = [*COMMAND, "--model", tiny_model, *SMALL_OPTIONS, *options]
    number, shards = 0, {shard.name for shard in read_manifest(from_disk).shards}
    while True:
        number += length(1, 7)  # of the upload at which it is killed
        before = proxy.count("PUT", "/out/")
        with subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as run:
            while run.poll() is None and proxy.count("PUT", "/out/") - before < number:
                time.sleep(0.005)
            killed = run.poll() is None
            run.kill()
            said = run.stderr.read().decode()
        if not killed:
            assert run.returncode == 0, said
            break
        if (out / "wan-data.json").exists():
            listed = {shard.name for shard in read_manifest(out).shards}
            assert all((out / name).is_file() for name in listed), "what the manifest names is there"
    assert content_of(out) == content_of(from_disk)
    assert {path.name for path in out.glob("*.tar")} == shards


def test_another_preparation_meanwhile_is_said(places, tiny_model, bucket, monkeypatch):
    folder, options, out = places
    assert prepare_stored(tiny_model, *options).exit_code == 0
    shutil.copy(folder / "clips" / "wide.mkv", folder / "clips" / "wide 2.mkv")
    (folder / "clips" / "wide 2.txt").write_text("Another.")
    other = (out / "wan-data.json").read_bytes() + b"\n"
    metadata = StoreOutput.write_metadata

    def meanwhile(self, *arguments):
        metadata(self, *arguments)
        write(bucket[1] / "out/wan-data.json", other)

    with monkeypatch.context() as patch:
        patch.setattr(StoreOutput, "write_metadata", meanwhile)
        result = prepare_stored(tiny_model, *options)
    assert result.exit_code == 1
    assert "was changed by another preparation meanwhile" in result.output
    assert (out / "wan-data.json").read_bytes() == other, "it is not replaced"
    result = prepare_stored(tiny_model, *options)
    assert result.exit_code == 0, result.output
    assert sum(read_manifest(out).samples.values()) == 14 + 3


def test_a_process_that_writes_the_dataset_is_named(places, tiny_model, bucket, tmp_path):
    _, options, _ = places
    with StoreOutput(bucket[1] / "out", tmp_path / "work").opened(Ranks()):
        result = prepare_stored(tiny_model, *options)
    assert result.exit_code == 1
    assert f"Error: {bucket[1]}/out is being written by process {os.getpid()}; wait for it" in result.output


def test_an_outage_ends_with_one_sentence_and_the_same_command_goes_on(
    places, from_disk, tiny_model, proxy, monkeypatch
):
    _, options, out = places
    monkeypatch.setenv("WAN_DATA_STORE_PATIENCE", "1")
    proxy.faults[:] = [Fault("PUT", "shard-rank00-000001.tar", status=503, times=10**6)]
    result = prepare_stored(tiny_model, *options)
    assert result.exit_code == 1
    (line,) = [line for line in result.output.splitlines() if line.startswith("Error")]
    assert "it answered 503" in line
    assert "run the same command again" in line
    assert not (out / "wan-data.json").exists()
    monkeypatch.setenv("WAN_DATA_STORE_PATIENCE", "20")
    proxy.faults[:] = [Fault("(GET|PUT)", "/(out|clips)/", status=500, times=5), Fault("GET", "mkv", cut=100, times=2)]
    result = prepare_stored(tiny_model, *options)
    assert result.exit_code == 0, result.output
    assert content_of(out) == content_of(from_disk)


def test_credentials_are_said_and_stored_nowhere(places, tiny_model, proxy, tmp_path):
    folder, options, _ = places
    proxy.faults[:] = [Fault("GET", "wide.mkv", status=403, times=10**6)]
    command = [*COMMAND, "--model", tiny_model, *SMALL_OPTIONS, *options]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "wide.mkv: it cannot be read: downloading was denied" in run.stdout
    files = b"".join(
        path.read_bytes() for place in (folder / "out", tmp_path) for path in place.rglob("*.*") if path.is_file()
    )
    assert proxy.authorizations, "they were used"
    for secret in (ACCESS_KEY, SECRET_KEY):
        assert secret not in run.stdout + run.stderr
        assert secret.encode() not in files


def test_a_reader_opens_the_dataset_while_large_files_of_it_are_replaced(places, bucket, clip, tiny_model, monkeypatch):
    folder, options, _ = places
    assert prepare_stored(tiny_model, *options).exit_code == 0
    before = splits(f"{bucket[1]}/out")
    clip(folder / "clips" / "wide.mkv", range(100, 118), size=(48, 64))  # its shard is replaced by another
    seen, real = {}, store_output.upload

    def opened(source, path):
        real(source, path)
        if path.suffix == ".sqlite":
            seen[path.name] = splits(f"{bucket[1]}/out")

    monkeypatch.setattr(store_output, "upload", opened)
    result = prepare_stored(tiny_model, *options, "--update")
    assert result.exit_code == 0, result.output
    assert seen == dict.fromkeys(("sources-000001.sqlite", "source-times.sqlite", "index.sqlite"), before)
    assert splits(f"{bucket[1]}/out") != before
