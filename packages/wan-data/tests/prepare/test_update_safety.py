"""What an update must not lose: samples of files that cannot be looked at, or used, or are damaged."""

import dataclasses
import json
import os
import shutil

import pytest
from changed_sources import change, change_a_byte, is_intact
from dataset_sources import records_of
from folder_digests import without_index

from wan_data.index.manifest import read_manifest
from wan_data.inspect.verify import verify
from wan_data.prepare import local_workers, run
from wan_data.prepare.output_folder import WORK_FOLDER
from wan_data.prepare.results import summary_lines
from wan_data.sources.folder import SourceFolder
from wan_data.sources.listing import files_of_listing
from wan_data.sources.modification_times import TIMES_NAME, source_times
from wan_model.testing.permissions import permissions_apply


def test_a_wrong_folder_does_not_empty_a_dataset(prepare_again, copies, clip, settings, tiny_model, tmp_path):
    out, _ = copies
    before = without_index(out)
    clip(tmp_path / "other" / "mute.mkv", range(9))
    with pytest.raises(ValueError, match=r"no sample for training would be left .* the 0 changed and the 6 missing"):
        prepare_again(tmp_path / "other", out, tiny_model, settings, update=True, remove_missing=True)
    after = without_index(out)
    assert {name: digest for name, digest in after.items() if not name.startswith(WORK_FOLDER)} == before
    with pytest.raises(ValueError, match="--overwrite replaces the whole dataset; pass it without --update"):
        prepare_again(tmp_path / "other", out, tiny_model, settings, update=True, overwrite=True)


def test_a_new_version_that_cannot_be_used_replaces_nothing(prepare_again, copies, settings, tiny_model, dataset):
    out, folder = copies
    (folder / "deep" / "tall.jsonl").unlink()
    content = (folder / "wide.mkv").read_bytes()
    (folder / "wide.mkv").write_bytes(content[: len(content) // 2])
    (folder / "many" / "all.jsonl").write_text(
        (folder / "many" / "all.jsonl").read_text().replace("A square.", "A good one.")
    )
    result = prepare_again(folder, out, tiny_model, settings, update=True)
    assert result.updated == tuple(f"many/clip {number}.v1.mkv" for number in range(4))
    assert list(result.kept) == ["deep/tall.mkv", "wide.mkv"]
    assert result.kept["deep/tall.mkv"].startswith("it has no caption: expected tall.json")
    assert result.kept["wide.mkv"].startswith("its last ")
    lines = summary_lines(result, out)
    assert "Changed files that cannot be used as they are now, and keep their samples (2):" in lines
    assert not any("--update" in line for line in lines)
    old = {record.path: record for record in records_of(dataset)}
    new = {record.path: record for record in records_of(out)}
    for name in ("deep/tall.mkv", "wide.mkv"):
        assert dataclasses.replace(new[name], shards=old[name].shards) == old[name]
        assert (new[name].verdict, new[name].samples) == ("accepted", old[name].samples)
    _, problems = verify(out)
    assert problems == []


def test_a_changed_source_of_which_nothing_can_be_encoded_keeps_its_samples(
    prepare_again, copies, settings, tiny_model, dataset, monkeypatch
):
    out, folder = copies
    change(folder)
    load = local_workers.load_codec

    def cut_a_file(*arguments, **more):
        wide = folder / "wide.mkv"
        wide.write_bytes(b"")
        return load(*arguments, **more)

    monkeypatch.setattr(local_workers, "load_codec", cut_a_file)
    result = prepare_again(folder, out, tiny_model, settings, update=True)
    assert result.updated == ("deep/tall.mkv", "many/clip 1.v1.mkv")
    assert list(result.kept) == ["wide.mkv"]
    of = {record.path: record for record in records_of(out)}
    assert of["wide.mkv"].sha256 == {one.path: one for one in records_of(dataset)}["wide.mkv"].sha256
    assert verify(out)[1] == []
    with source_times(out) as times:
        assert times.find(["wide.mkv"]).get("wide.mkv") != (folder / "wide.mkv").stat().st_mtime_ns


def test_a_damaged_shard_is_not_copied(prepare_again, copies, settings, tiny_model, silent):
    out, folder = copies
    (record,) = (one for one in records_of(out) if one.path == "deep/tall.mkv")
    shard = out / record.shards[0]
    content = bytearray(shard.read_bytes())
    content[-2000] ^= 1
    shard.write_bytes(content)
    change(folder)
    with pytest.raises(ValueError, match=rf"{record.shards[0]} is missing or damaged, .* or pass --overwrite"):
        prepare_again(folder, out, tiny_model, settings, update=True, report=silent)
    assert not any(line.startswith("encoding") for line in silent.lines)
    # Nothing was planned: what does not need the shard goes on.
    prepare_again(folder, out, tiny_model, settings)
    content[-2000] ^= 1
    shard.write_bytes(content)
    prepare_again(folder, out, tiny_model, settings, update=True)
    is_intact(out, folder)


def test_what_cannot_be_looked_at_is_not_missing(prepare_again, copies, settings, tiny_model):
    out, folder = copies
    (folder / "wide.mkv").rename(folder / "away")
    (folder / "wide.mkv").symlink_to(folder / "elsewhere.mkv")
    result = prepare_again(folder, out, tiny_model, settings, update=True, remove_missing=True)
    assert (result.missing, result.removed) == ((), ())
    assert result.kept == {"wide.mkv": "it cannot be read: No such file or directory"}
    (folder / "deep").chmod(0)
    try:
        with (
            permissions_apply(),
            pytest.raises(ValueError, match=r"/deep cannot be listed: Permission denied; make it"),
        ):
            SourceFolder(folder).files()
    finally:
        (folder / "deep").chmod(0o700)


def test_a_broken_row_of_a_listing_removes_nothing(copies, settings, tiny_model, silent, tmp_path):
    out, folder = copies
    names = sorted(record.path for record in records_of(out))
    rows = [json.dumps({"video_path": name, "caption": "x"}) for name in names]
    listing = tmp_path / "list.jsonl"
    listing.write_text("\n".join([*rows[:3], rows[3][:-1], *rows[5:]]) + "\n")
    sources = files_of_listing(listing, folder)
    options = {"report": silent, "device": "cpu", "decoders": 1}
    with pytest.raises(
        ValueError, match=r"--remove-missing cannot tell .* while 1 rows name none \(list.jsonl line 4: it is"
    ):
        run.prepare(sources, out, str(tiny_model), settings, remove_missing=True, **options)
    assert len(records_of(out)) == 6


def test_a_clip_that_changes_after_it_was_probed_is_not_taken_for_the_old_one(
    prepare_again, clips, settings, tiny_model, tmp_path, monkeypatch
):
    folder, load = shutil.copytree(clips, tmp_path / "in"), local_workers.load_codec
    again = folder / "many" / "clip 1.v1.mkv"

    def change_a_file(*arguments, **more):
        change_a_byte(folder / "wide.mkv")
        os.utime(again)  # the same content at another time
        return load(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(local_workers, "load_codec", change_a_file)
        prepare_again(folder, tmp_path / "out", tiny_model, settings)
    records = {record.path: record for record in records_of(tmp_path / "out")}
    assert records["wide.mkv"].verdict == "rejected"
    assert records["wide.mkv"].reason == "the file has changed since it was probed"
    assert records["many/clip 1.v1.mkv"].verdict == "accepted"
    prepare_again(folder, tmp_path / "out", tiny_model, settings)
    assert {record.verdict for record in records_of(tmp_path / "out")} == {"accepted"}
    is_intact(tmp_path / "out", folder)


def test_a_clip_of_the_validation_split_stays_there(prepare_again, copies, settings, tiny_model, silent):
    out, folder = copies
    (name,) = (record.path for record in records_of(out) if record.split == "val")
    change_a_byte(folder / name)
    result = prepare_again(folder, out, tiny_model, settings, update=True)
    assert [record.path for record in records_of(out) if record.split == "val"] == [name]
    (folder / name).unlink()
    result = prepare_again(folder, out, tiny_model, settings, remove_missing=True, report=silent)
    assert set(result.manifest.samples) == {"train"}
    assert "no sample for validation will be left: its files are among those that are missing" in silent.lines


def test_a_rejected_file_that_is_gone_is_forgotten(prepare_again, copies, clip, settings, tiny_model, dataset):
    out, folder = copies
    clip(folder / "mute.mkv", range(9))
    result = prepare_again(folder, out, tiny_model, settings)
    assert [one.path for one in records_of(out) if one.verdict == "rejected"] == ["mute.mkv"]
    (folder / "mute.mkv").unlink()
    result = prepare_again(folder, out, tiny_model, settings)
    assert records_of(out) == records_of(dataset)
    assert (result.manifest.index.counts, result.manifest.shards) == (
        read_manifest(dataset).index.counts,
        read_manifest(dataset).shards,
    )


@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_something_else_in_the_place_of_the_times_does_not_matter(kind, prepare_again, copies, settings, tiny_model):
    out, folder = copies
    (out / TIMES_NAME).unlink()
    (os.mkfifo if kind == "fifo" else os.mkdir)(out / TIMES_NAME)
    result = prepare_again(folder, out, tiny_model, settings)
    assert (result.changed, result.missing) == ((), ())
    assert not (out / WORK_FOLDER).exists()
