"""A dataset follows its sources: changes are named, ``update`` brings them in, ``remove_missing`` takes samples out."""

import collections
import dataclasses
import importlib
import json
import os
import shutil
import tarfile
import threading
import time

import pytest
from folder_digests import without_index
from thread_ranks import ThreadRanks
from torch.distributed import HashStore

from wan_data.inspect.verify import verify
from wan_data.prepare import run
from wan_data.prepare.changes import SourceChanges, captions_of, find_changes
from wan_data.prepare.folder import files_of_folder
from wan_data.prepare.output_folder import WORK_FOLDER
from wan_data.prepare.results import summary_lines
from wan_data.prepare.settings import PrepareSettings
from wan_data.prepare.source_times import TIMES_NAME, read_times
from wan_data.prepare.sources import files_of_listing
from wan_data.shards.manifest import read_manifest
from wan_data.shards.writer import source_key
from wan_model.testing.permissions import permissions_apply


@pytest.fixture
def copies(dataset, clips, tmp_path):
    """A dataset and its clips, to be changed."""
    return shutil.copytree(dataset, tmp_path / "out"), shutil.copytree(clips, tmp_path / "in")


@pytest.fixture
def settings(small):
    return PrepareSettings(**small)


def change_a_byte(path):
    """Change the content of a Matroska file but neither its size nor its frames."""
    content = path.read_bytes()
    assert content.count(b"Lavf") > 0
    path.write_bytes(content.replace(b"Lavf", b"Lavg"))


def change(folder):
    """Another caption for a clip of two shapes' shards, another content of equal size for one, another size for one."""
    (folder / "deep" / "tall.jsonl").write_text('{"caption": "It has another one now."}\n')
    change_a_byte(folder / "many" / "clip 1.v1.mkv")
    shutil.copy(folder / "many" / "clip 3.v1.mkv", folder / "wide.mkv")
    return ["deep/tall.mkv", "many/clip 1.v1.mkv", "wide.mkv"]


def samples(folder):
    """The content of each sample's members, by key and kind."""
    found = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                assert member.name not in found, f"{member.name} is there twice"
                found[member.name] = tar.extractfile(member).read()
    return found


def is_intact(folder, sources):
    checked, problems = verify(folder, sources=sources, caption_of=captions_of(folder, sources, None))
    assert problems == []
    listed = {shard.name for shard in read_manifest(folder).shards}
    assert {path.name for path in folder.glob("*.tar")} == listed
    assert {path.name for path in folder.glob("*.tar.idx")} == {f"{name}.idx" for name in listed}
    assert not (folder / WORK_FOLDER).exists()
    return checked


def test_changes_are_named_and_left(prepare_again, copies, settings, tiny_model):
    out, folder = copies
    before = read_manifest(out)
    size = {record.path: record.bytes for record in before.sources}["wide.mkv"]
    change(folder)
    (folder / "many" / "clip 2.v1.mkv").unlink()
    result = prepare_again(folder, out, tiny_model, settings)
    assert result.manifest == before, "finished shards stay"
    assert result.changed == (
        "deep/tall.mkv has another caption",
        "many/clip 1.v1.mkv has another content of the same size",
        f"wide.mkv has {(folder / 'wide.mkv').stat().st_size} bytes instead of {size}",
    )
    assert result.missing == ("many/clip 2.v1.mkv",)
    lines = summary_lines(result, out)
    assert "Files that have changed since they were encoded, whose samples stay as they are (3; --update" in lines[-6]
    assert lines[-5:-2] == [f"  {sentence}" for sentence in result.changed]
    assert (
        "Files of the dataset that are not among these any more, whose samples stay (1; --remove-missing" in lines[-2]
    )
    _, problems = verify(out, sources=folder, caption_of=captions_of(out, folder, None))
    assert len(problems) == 4, "verify finds the same"
    (folder / "deep" / "tall.jsonl").unlink()
    result = prepare_again(folder, out, tiny_model, settings)
    assert result.changed[0].startswith("deep/tall.mkv has lost its caption: it has no caption: expected tall.json")
    # A dataset of a version that recorded neither captions nor times: contents are compared.
    old = dataclasses.replace(
        before, sources=tuple(dataclasses.replace(one, caption_sha256=None) for one in before.sources)
    )
    found = find_changes(files_of_folder(folder, settings), old, {})
    assert list(found.changed) == ["many/clip 1.v1.mkv", "wide.mkv"]


def test_a_content_is_read_again_only_when_its_time_has_changed(prepare_again, copies, settings, tiny_model, silent):
    out, folder = copies
    clip = folder / "wide.mkv"
    known = read_times(out)
    assert known == {
        name: (folder / name).stat().st_mtime_ns for name in [record.path for record in read_manifest(out).sources]
    }
    # The same content at another time, as a copy has it, is read once.
    os.utime(clip, ns=(0, 7))
    result = prepare_again(folder, out, tiny_model, settings, report=silent)
    assert (result.changed, silent.lines) == ((), ["comparing 1", "wide.mkv"])
    assert read_times(out) == {**known, "wide.mkv": 7}
    silent.lines.clear()
    prepare_again(folder, out, tiny_model, settings, report=silent)
    assert silent.lines == []
    # Without the file all are read.
    (out / TIMES_NAME).write_text("[1")
    prepare_again(folder, out, tiny_model, settings, report=silent)
    assert silent.lines[0] == "comparing 6"
    assert read_times(out) == {**known, "wide.mkv": 7}


@pytest.fixture(scope="module")
def updated(prepare_again, dataset, clips, tiny_model, small, tmp_path_factory):
    """Changed sources, the dataset that was brought up to them, and what the preparation returned."""
    root = tmp_path_factory.mktemp("updated")
    out, folder = shutil.copytree(dataset, root / "out"), shutil.copytree(clips, root / "in")
    change(folder)
    return folder, out, prepare_again(folder, out, tiny_model, PrepareSettings(**small), update=True)


def test_an_updated_dataset_has_the_samples_of_a_new_one(updated, prepare_again, dataset, tiny_model, small, tmp_path):
    folder, out, result = updated
    assert result.updated == ("deep/tall.mkv", "many/clip 1.v1.mkv", "wide.mkv")
    assert (result.changed, result.kept, result.missing, result.removed) == ((), {}, (), ())
    is_intact(out, folder)
    new = prepare_again(folder, tmp_path / "new", tiny_model, PrepareSettings(**small))
    assert samples(out) == samples(tmp_path / "new")
    facts = [
        {record.path: dataclasses.replace(record, shards=(), split=None) for record in one.manifest.sources}
        for one in (result, new)
    ]
    assert facts[0] == facts[1]
    counts = collections.Counter()
    for shape in result.manifest.shapes:
        counts[shape.latent] += shape.samples
    for shape in new.manifest.shapes:
        counts[shape.latent] -= shape.samples
    assert not any(counts.values())
    # A shard keeps its name and bytes, or its name is not used again.
    before = {shard.name: shard for shard in read_manifest(dataset).shards}
    after = {shard.name: shard for shard in result.manifest.shards}
    assert {name for name in before if name in after} == {name for name in before if after.get(name) == before[name]}
    assert min(set(after) - set(before)) > max(before)


def test_nothing_is_to_be_done_after_an_update(updated, prepare_again, tiny_model, small, silent):
    folder, out, result = updated
    before = without_index(out)
    again = prepare_again(folder, out, tiny_model, PrepareSettings(**small), update=True, report=silent)
    assert (again.manifest, again.updated, silent.lines) == (result.manifest, (), [])
    assert without_index(out) == before


def test_missing_files_are_removed_on_request_only(prepare_again, copies, dataset, settings, tiny_model, silent):
    out, folder = copies
    gone = ["many/clip 0.v1.mkv", "many/clip 2.v1.mkv"]
    for name in gone:
        (folder / name).unlink()
    result = prepare_again(folder, out, tiny_model, settings, update=True)
    assert (result.missing, result.removed, result.manifest) == (tuple(gone), (), read_manifest(dataset))
    result = prepare_again(folder, out, tiny_model, settings, remove_missing=True, report=silent)
    assert (result.missing, result.removed) == ((), tuple(gone))
    assert not any(line.startswith(("probing", "loading", "encoding")) for line in silent.lines)
    is_intact(out, folder)
    keys = {source_key(name) for name in gone}
    assert samples(out) == {
        name: content for name, content in samples(dataset).items() if name.partition("_")[0] not in keys
    }
    assert not {record.path for record in result.manifest.sources} & set(gone)


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
    old = {record.path: record for record in read_manifest(dataset).sources}
    new = {record.path: record for record in result.manifest.sources}
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
    load = run.load_codec

    def cut_a_file(*arguments, **more):
        wide = folder / "wide.mkv"
        wide.write_bytes(b"")
        return load(*arguments, **more)

    monkeypatch.setattr(run, "load_codec", cut_a_file)
    result = prepare_again(folder, out, tiny_model, settings, update=True)
    assert result.updated == ("deep/tall.mkv", "many/clip 1.v1.mkv")
    assert list(result.kept) == ["wide.mkv"]
    of = {record.path: record for record in result.manifest.sources}
    assert of["wide.mkv"].sha256 == {one.path: one for one in read_manifest(dataset).sources}["wide.mkv"].sha256
    assert verify(out)[1] == []
    assert "wide.mkv" not in read_times(out) or read_times(out)["wide.mkv"] != (folder / "wide.mkv").stat().st_mtime_ns


STOPS = {
    "before the shards": ("wan_data.prepare.run", "_Preparation._write_shard"),
    "before a shard is rewritten": ("wan_data.prepare.run", "rewrite_shard"),
    "before the metadata": ("wan_data.prepare.run", "write_metadata"),
    "before the manifest": ("wan_data.prepare.run", "Manifest.write"),
    "before old shards are deleted": ("wan_data.prepare.run", "delete_superseded"),
    "before the times": ("wan_data.prepare.run", "write_times"),
}


@pytest.mark.parametrize("stop", STOPS)
def test_an_interrupted_update_is_taken_up(stop, updated, prepare_again, copies, settings, tiny_model, monkeypatch):
    out, folder = copies
    change(folder)
    module, name = STOPS[stop]
    owner = importlib.import_module(module)
    *path, attribute = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    reached = []

    class Stopped(Exception):
        pass

    def stopped(*arguments, **more):
        reached.append(arguments)
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, stopped)
        with pytest.raises(Stopped):
            prepare_again(folder, out, tiny_model, settings, update=True)
    assert len(reached) == 1
    # The same command without the flag goes on with what was planned.
    result = prepare_again(folder, out, tiny_model, settings)
    _, as_planned, _ = updated
    is_intact(out, folder)
    assert result.changed == ()
    # The clips of the other dataset have other times.
    assert set(read_times(out)) == set(read_times(as_planned))
    (out / TIMES_NAME).write_bytes((as_planned / TIMES_NAME).read_bytes())
    assert without_index(out) == without_index(as_planned)


def test_a_damaged_shard_is_not_copied(prepare_again, copies, settings, tiny_model, silent):
    out, folder = copies
    (record,) = (one for one in read_manifest(out).sources if one.path == "deep/tall.mkv")
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


def by_both(of_rank):
    """What each of two ranks returns; a rank that fails leaves the other waiting, so that waiting has an end."""
    results = {}
    threads = [
        threading.Thread(target=lambda rank=rank: results.update({rank: of_rank(rank)}), daemon=True)
        for rank in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return [results[rank] for rank in range(2)]


def test_an_update_by_two_ranks_gives_the_same_bytes(updated, prepare_again, copies, settings, tiny_model, monkeypatch):
    out, folder = copies
    # The libraries that load a model change torch for all threads meanwhile.
    load, one_at_a_time = run.load_codec, threading.Lock()

    def load_alone(*arguments, **more):
        with one_at_a_time:
            return load(*arguments, **more)

    monkeypatch.setattr(run, "load_codec", load_alone)
    change(folder)
    store = HashStore()

    def of_rank(rank):
        ranks = ThreadRanks(store, rank, 2)
        return prepare_again(folder, out, tiny_model, settings, update=True, ranks=ranks)

    results = by_both(of_rank)
    _, by_one, result = updated
    assert results[0] == results[1] == result
    # A rank that is late finds what the first one has written, also where nothing is to be done.
    read, store = SourceChanges.read, HashStore()
    monkeypatch.setattr(SourceChanges, "read", lambda path: time.sleep(0.5) or read(path))
    assert [one.manifest for one in by_both(of_rank)] == [result.manifest] * 2
    (out / TIMES_NAME).write_bytes((by_one / TIMES_NAME).read_bytes())
    assert without_index(out) == without_index(by_one)


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
            files_of_folder(folder, settings)
    finally:
        (folder / "deep").chmod(0o700)


def test_a_broken_row_of_a_listing_removes_nothing(copies, settings, tiny_model, silent, tmp_path):
    out, folder = copies
    names = sorted(record.path for record in read_manifest(out).sources)
    rows = [json.dumps({"video_path": name, "caption": "x"}) for name in names]
    listing = tmp_path / "list.jsonl"
    listing.write_text("\n".join([*rows[:3], rows[3][:-1], *rows[5:]]) + "\n")
    sources = files_of_listing(listing, folder, settings)
    options = {"report": silent, "device": "cpu", "decoders": 1}
    with pytest.raises(ValueError, match=r"--remove-missing cannot tell .* while 1 rows name none \(list.jsonl line 4"):
        run.prepare(sources, out, str(tiny_model), settings, remove_missing=True, **options)
    assert len(read_manifest(out).sources) == 6


def test_a_clip_that_changes_after_it_was_probed_is_not_taken_for_the_old_one(
    prepare_again, clips, settings, tiny_model, tmp_path, monkeypatch
):
    folder, load = shutil.copytree(clips, tmp_path / "in"), run.load_codec
    again = folder / "many" / "clip 1.v1.mkv"

    def change_a_file(*arguments, **more):
        change_a_byte(folder / "wide.mkv")
        os.utime(again)  # the same content at another time
        return load(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(run, "load_codec", change_a_file)
        result = prepare_again(folder, tmp_path / "out", tiny_model, settings)
    records = {record.path: record for record in result.manifest.sources}
    assert records["wide.mkv"].verdict == "rejected"
    assert records["wide.mkv"].reason == "the file has changed since it was probed"
    assert records["many/clip 1.v1.mkv"].verdict == "accepted"
    result = prepare_again(folder, tmp_path / "out", tiny_model, settings)
    assert {record.verdict for record in result.manifest.sources} == {"accepted"}
    is_intact(tmp_path / "out", folder)


def test_a_clip_of_the_validation_split_stays_there(prepare_again, copies, settings, tiny_model, silent):
    out, folder = copies
    (name,) = (record.path for record in read_manifest(out).sources if record.split == "val")
    change_a_byte(folder / name)
    result = prepare_again(folder, out, tiny_model, settings, update=True)
    assert [record.path for record in result.manifest.sources if record.split == "val"] == [name]
    (folder / name).unlink()
    result = prepare_again(folder, out, tiny_model, settings, remove_missing=True, report=silent)
    assert set(result.manifest.samples) == {"train"}
    assert "no sample for validation will be left: its files are among those that are missing" in silent.lines


def test_old_shards_go_also_when_the_next_run_has_more_to_do(
    prepare_again, copies, clip, settings, tiny_model, monkeypatch
):
    out, folder = copies
    change(folder)
    with monkeypatch.context() as patch:
        patch.setattr(run, "delete_superseded", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare_again(folder, out, tiny_model, settings, update=True)
    assert any("is no shard of wan-data.json: delete it" in problem for problem in verify(out)[1])
    clip(folder / "new.mkv", range(9), size=(48, 64))
    (folder / "new.txt").write_text("New.")
    (folder / "deep" / "tall.jsonl").write_text('{"caption": "Yet another one."}')
    prepare_again(folder, out, tiny_model, settings, update=True)
    is_intact(out, folder)


def test_a_rejected_file_that_is_gone_is_forgotten(prepare_again, copies, clip, settings, tiny_model, dataset):
    out, folder = copies
    clip(folder / "mute.mkv", range(9))
    result = prepare_again(folder, out, tiny_model, settings)
    assert [one.path for one in result.manifest.sources if one.verdict == "rejected"] == ["mute.mkv"]
    (folder / "mute.mkv").unlink()
    result = prepare_again(folder, out, tiny_model, settings)
    assert result.manifest == read_manifest(out) == read_manifest(dataset)


@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_something_else_in_the_place_of_the_times_does_not_matter(kind, prepare_again, copies, settings, tiny_model):
    out, folder = copies
    (out / TIMES_NAME).unlink()
    (os.mkfifo if kind == "fifo" else os.mkdir)(out / TIMES_NAME)
    result = prepare_again(folder, out, tiny_model, settings)
    assert (result.changed, result.missing) == ((), ())
    assert not (out / WORK_FOLDER).exists()
