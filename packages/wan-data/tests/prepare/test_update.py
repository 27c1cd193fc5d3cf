"""A dataset follows its sources: changes are named, ``update`` brings them in, ``remove_missing`` takes samples out."""

import collections
import dataclasses
import importlib
import os
import shutil
import threading
import time

import pytest
from changed_sources import change, is_intact, samples
from dataset_sources import records_of
from folder_digests import without_index
from thread_ranks import ThreadRanks
from torch.distributed import HashStore

from wan_data.index.manifest import read_manifest
from wan_data.index.part import Part
from wan_data.index.sources import SourceIndex
from wan_data.inspect.verify import verify
from wan_data.prepare import local_workers, run
from wan_data.prepare.results import summary_lines
from wan_data.prepare.settings import PrepareSettings
from wan_data.shards.writer import source_key
from wan_data.sources.changes import captions_of, find_changes
from wan_data.sources.folder import SourceFolder
from wan_data.sources.modification_times import TIMES_NAME, SourceTimes, source_times
from wan_data.storage.local_copies import LocalCopies


def times_of(folder):
    with source_times(folder) as times:
        return times.find([record.path for record in records_of(folder)])


def test_changes_are_named_and_left(prepare_again, copies, settings, tiny_model):
    out, folder = copies
    before = read_manifest(out)
    size = {record.path: record.bytes for record in records_of(out)}["wide.mkv"]
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
    old = [dataclasses.replace(one, caption_sha256=None) for one in records_of(out)]
    index = SourceIndex([Part.of_records(old, "it")])
    found = find_changes(
        SourceFolder(folder).files(), index, before.index.counts, SourceTimes(None), copies=LocalCopies()
    )
    assert list(found.changed) == ["many/clip 1.v1.mkv", "wide.mkv"]


def test_a_content_is_read_again_only_when_its_time_has_changed(prepare_again, copies, settings, tiny_model, silent):
    out, folder = copies
    clip = folder / "wide.mkv"
    known = times_of(out)
    assert known == {name: (folder / name).stat().st_mtime_ns for name in [record.path for record in records_of(out)]}
    # The same content at another time, as a copy has it, is read once.
    os.utime(clip, ns=(0, 7))
    result = prepare_again(folder, out, tiny_model, settings, report=silent)
    assert (result.changed, silent.lines) == ((), ["comparing 1", "wide.mkv"])
    assert times_of(out) == {**known, "wide.mkv": 7}
    silent.lines.clear()
    prepare_again(folder, out, tiny_model, settings, report=silent)
    assert silent.lines == []
    # Without the file all are read.
    (out / TIMES_NAME).write_text("[1")
    prepare_again(folder, out, tiny_model, settings, report=silent)
    assert silent.lines[0] == "comparing 6"
    assert times_of(out) == {**known, "wide.mkv": 7}


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
        {record.path: dataclasses.replace(record, shards=(), split=None) for record in records_of(one)}
        for one in (out, tmp_path / "new")
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
    assert not {record.path for record in records_of(out)} & set(gone)


STOPS = {
    "before the shards": ("wan_data.prepare.local_workers", "write_shard"),
    "before a shard is rewritten": ("wan_data.prepare.run", "rewrite_shard"),
    "before the metadata": ("wan_data.prepare.outputs", "write_metadata"),
    "before the manifest": ("wan_data.prepare.run", "Manifest.write"),
    "before old shards are deleted": ("wan_data.prepare.run", "delete_superseded"),
    "before the times": ("wan_data.prepare.run", "_Run._remember_times"),
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
    assert set(times_of(out)) == set(times_of(as_planned))
    assert without_index(out) == without_index(as_planned)


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
    load, one_at_a_time = local_workers.load_codec, threading.Lock()

    def load_alone(*arguments, **more):
        with one_at_a_time:
            return load(*arguments, **more)

    monkeypatch.setattr(local_workers, "load_codec", load_alone)
    change(folder)
    store = HashStore()

    def of_rank(rank):
        ranks = ThreadRanks(store, rank, 2)
        return prepare_again(folder, out, tiny_model, settings, update=True, ranks=ranks)

    results = by_both(of_rank)
    _, by_one, result = updated
    assert results[0] == results[1] == result
    # A rank that is late finds what the first one has written, also where nothing is to be done.
    read, store = run.read_work_file, HashStore()
    monkeypatch.setattr(run, "read_work_file", lambda path, kind: time.sleep(0.5) or read(path, kind))
    assert [one.manifest for one in by_both(of_rank)] == [result.manifest] * 2
    (out / TIMES_NAME).write_bytes((by_one / TIMES_NAME).read_bytes())
    assert without_index(out) == without_index(by_one)


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
