import importlib
import json
import shutil

import pytest
from dataset_sources import records_of
from folder_digests import digests

from wan_data.index.manifest import read_manifest
from wan_data.prepare.settings import PrepareSettings
from wan_model.system.files import sha256_of


def test_samples_that_were_read_otherwise_are_not_added_to(prepared, dataset, clips, tiny_model, small, tmp_path):
    out = shutil.copytree(dataset, tmp_path / "out")
    manifest = json.loads((out / "wan-data.json").read_bytes())
    del manifest["settings"]["reading_version"], manifest["settings"]["background"]  # as versions before wrote it
    (out / "wan-data.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"read by another version of wan-data, .*pass --overwrite to replace it"):
        prepared(clips, out, tiny_model, PrepareSettings(**small))


def test_a_dataset_of_other_settings_is_replaced_only_when_asked(
    prepared, dataset, clips, clip, tiny_model, small, tmp_path
):
    out = shutil.copytree(dataset, tmp_path / "out")
    clip(tmp_path / "in" / "a.mkv", range(9))
    (tmp_path / "in" / "a.json").write_text('{"caption": "x"}')
    settings = PrepareSettings(**{**small, "samples_per_shard": 4})
    with pytest.raises(ValueError, match=r"other settings \(samples_per_shard 4 instead of 3\); .*pass --overwrite"):
        prepared(tmp_path / "in", out, tiny_model, settings)
    assert digests(out) == digests(dataset)
    prepared(tmp_path / "in", out, tiny_model, settings, overwrite=True)
    assert [path.name for path in sorted(out.glob("*.tar"))] == ["shard-rank00-000000.tar"]


def test_the_same_command_again_changes_nothing(
    prepared, dataset, clips, tiny_model, small, silent, tmp_path, monkeypatch
):
    out, reads = shutil.copytree(dataset, tmp_path / "out"), []

    def counted(folder, **more):
        reads.append(folder)
        return read_manifest(folder, **more)

    monkeypatch.setattr("wan_data.prepare.run.read_manifest", counted)
    manifest = prepared(clips, out, tiny_model, PrepareSettings(**small), report=silent)
    assert manifest == read_manifest(dataset)
    assert reads == [out], "a manifest of millions of sources is read once"
    assert digests(out) == digests(dataset)
    assert silent.lines == [], "nothing is probed and no model is loaded"


def test_new_files_are_added_and_finished_shards_stay(
    prepared, dataset, clips, clip, tiny_model, small, silent, tmp_path
):
    out, more = shutil.copytree(dataset, tmp_path / "out"), shutil.copytree(clips, tmp_path / "more")
    clip(more / "a new one.mkv", range(100, 118), size=(48, 64))
    (more / "a new one.txt").write_text("New.\n")
    (more / "wide copy.mkv").write_bytes((more / "wide.mkv").read_bytes())
    (more / "wide copy.txt").write_text("The same frames.")
    (held_out,) = (record.path for record in records_of(dataset) if record.split == "val")
    shutil.copy(more / held_out, more / "val copy.mkv")
    (more / "val copy.txt").write_text("The frames of the validation clip.")
    clip(more / "mute.mkv", range(9))
    before = {path.name: (sha256_of(path), path.stat().st_mtime_ns) for path in out.glob("*.tar")}
    manifest = prepared(more, out, tiny_model, PrepareSettings(**small), report=silent)
    assert {name: (sha256_of(out / name), (out / name).stat().st_mtime_ns) for name in before} == before
    assert manifest.shards[: len(before)] == read_manifest(dataset).shards
    assert len(manifest.shards) > len(before)
    records = {record.path: record for record in records_of(out)}
    assert records["a new one.mkv"].samples == 2
    assert records["mute.mkv"].verdict == "rejected"
    assert records["wide copy.mkv"].split == records["wide.mkv"].split == "train"
    assert records["val copy.mkv"].split == "val", "a copy of a validation clip does not go into training"
    assert "probing 4" in silent.lines, "sources of the dataset are not probed again"
    total = 14 + 2 + 3 + records[held_out].samples
    assert sum(manifest.samples.values()) == sum(shape.samples for shape in manifest.shapes) == total
    assert sum(json.loads((out / ".nv-meta" / ".info.json").read_text())["shard_counts"].values()) == total
    # A caption for what had none, and one more copy: the third batch knows the splits of the first.
    (more / "mute.txt").write_text("Now it has one.")
    shutil.copy(more / held_out, more / "another val copy.mkv")
    (more / "another val copy.txt").write_text("Again the frames of the validation clip.")
    again = prepared(more, out, tiny_model, PrepareSettings(**small))
    assert {record.path: record.verdict for record in records_of(out)}["mute.mkv"] == "accepted"
    assert {record.path: record.split for record in records_of(out)}["another val copy.mkv"] == "val"
    assert again.shards[: len(manifest.shards)] == manifest.shards


def test_cached_probe_results_are_used_again(prepared, clips, tiny_model, small, tmp_path, monkeypatch):
    settings, out = PrepareSettings(**small), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("wan_data.prepare.planning.plan_shard_batch", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepared(clips, out, tiny_model, settings)
    with monkeypatch.context() as patch:
        patch.setattr(
            "wan_data.prepare.probing.source_probe.SourceProbe._decode_completely",
            lambda self, path, *_: pytest.fail(f"{path} is decoded again"),
        )
        touched, copy = shutil.copytree(clips, tmp_path / "touched"), shutil.copytree(out, tmp_path / "copy")
        (touched / "wide.mkv").touch()
        with pytest.raises(pytest.fail.Exception, match="wide"):
            prepared(touched, copy, tiny_model, settings)
        prepared(clips, out, tiny_model, settings)


def test_a_source_that_breaks_between_probing_and_encoding(
    prepared, clips, tiny_model, small, silent, tmp_path, monkeypatch
):
    folder = shutil.copytree(clips, tmp_path / "in")
    load = "wan_data.prepare.local_workers.load_codec"
    original = importlib.import_module("wan_data.prepare.local_workers").load_codec

    def cut_a_file(*arguments, **more):
        wide = folder / "wide.mkv"
        wide.write_bytes(wide.read_bytes()[: wide.stat().st_size // 2])
        return original(*arguments, **more)

    monkeypatch.setattr(load, cut_a_file)
    manifest = prepared(folder, tmp_path / "out", tiny_model, PrepareSettings(**small), report=silent)
    wide = next(record for record in records_of(tmp_path / "out") if record.path == "wide.mkv")
    assert wide.samples < 3
    assert all("although it could be decoded before" in reason for _, reason in wide.dropped)
    assert sum(manifest.samples.values()) == 11 + wide.samples
