"""Datasets that are written into a store, on a real server."""

import shutil

import pytest
from stored_datasets import content_of, prepare_stored, upload_folder

from wan_data.index.manifest import read_manifest


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
    assert {name: read_manifest(out).shards for name in ("a",)} == {name: read_manifest(disk).shards for name in ("a",)}
