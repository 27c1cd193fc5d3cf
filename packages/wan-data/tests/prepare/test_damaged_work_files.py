"""The files of an unfinished preparation, damaged: one sentence that names the file and what to do, or no matter."""

import dataclasses
import fcntl
import json
import os
from pathlib import Path

import pytest
from thread_ranks import ThreadRanks

from wan_data.prepare import run as preparation
from wan_data.prepare.output_folder import output_folder
from wan_data.prepare.probe import ProbeCache
from wan_data.prepare.probe_stage import gathered, probe_only
from wan_data.prepare.ranks import Ranks
from wan_data.prepare.removal import RewrittenShard, delete_superseded, note_superseded
from wan_data.prepare.results import FinishedShard
from wan_data.prepare.settings import PrepareSettings
from wan_data.prepare.shard_batches import ShardBatch
from wan_data.prepare.work_files import check_work_folder, read_work_file
from wan_data.shards.lock import writer_lock
from wan_data.shards.manifest import Manifest
from wan_data.shards.writer import ShardRecord
from wan_data.sources.changes import SourceChanges
from wan_data.video.decode import ClipInfo
from wan_model.latent_spec import LatentSpec

SPEC = LatentSpec(1, 4, 8, (0.0,), (1.0,), 8, 8, "model")
MANIFEST = Manifest(True, "1", SPEC, {})


class TwoRanks(ThreadRanks):
    def __init__(self):
        super().__init__(None, 0, 2)

    def barrier(self, name):
        pass


READERS = {
    "superseded.json": lambda work: delete_superseded(work.parent, work, MANIFEST),
    "shard-000000.json": lambda work: FinishedShard.read(work / "shard-000000.json"),
    "rewritten-000001.json": lambda work: RewrittenShard.read(work / "rewritten-000001.json"),
    "changes.json": lambda work: read_work_file(work / "changes.json", SourceChanges),
    "round.json": ShardBatch.read,
    "verdicts-00001.json": lambda work: gathered([], work, TwoRanks()),
}
RECORD = {"name": "shard-rank00-000001.tar", "split": "train", "samples": 1, "bytes": 1, "sha256": "0"}
SHARD = {"record": RECORD, "samples": {}, "shapes": [], "dropped": [], "cut": {}}
PLANNED = {"name": "a", "path": "/a", "bytes": 1, "sha256": "0", "caption": "x", "info": [1, 1, 1.0, 16.0, 16.0, 1]}
PLANNED |= {"size": {"height": 16, "width": 16}, "windows": [[0, 5]], "mtime_ns": 0}
BATCH = {"first_shard": 0, "accepted": [{**PLANNED, "split": "train"}], "rejected": [], "replaced": [], "removed": []}
# One value each is of another type than the readers expect.
WRONG = {
    "superseded.json": [{"shards": [1]}, {"shards": "x"}, {"shards": ["../../other.tar"]}, {"shards": ["other.tar"]}],
    "shard-000000.json": [
        {**SHARD, "record": {**RECORD, "samples": "x"}},
        {**SHARD, "samples": {"a": True}},
        {**SHARD, "shapes": [[5, 32, 32, "16", 1]]},
        {**SHARD, "dropped": [["a", 1]]},
    ],
    "rewritten-000001.json": [{"old": "a", "record": None, "removed": [[1, 2, 3]]}],
    "changes.json": [{"changed": ["a"], "missing": []}, {"changed": {}, "missing": [None]}],
    "round.json": [
        {**BATCH, "first_shard": 1.5},
        {**BATCH, "accepted": [PLANNED]},
        {**BATCH, "accepted": [{**PLANNED, "split": "train", "windows": [[0]]}]},
        {**BATCH, "accepted": [{**PLANNED, "split": "train", "caption": "\ud800"}]},
        {**BATCH, "accepted": [{**PLANNED, "split": "train", "path": "\0"}]},
        {**BATCH, "accepted": [{**PLANNED, "split": "train", "size": {"height": 16}}]},
        {**BATCH, "accepted": [{**PLANNED, "split": "train", "size": {"height": 16, "width": 16, "depth": 1}}]},
    ],
    "verdicts-00001.json": [[{"reason": 3, "name": "a"}], [3], [{**PLANNED, "bytes": None}]],
}


@pytest.fixture
def work(tmp_path):
    (tmp_path / ".wan-data").mkdir()
    return tmp_path / ".wan-data"


def refused(name, work):
    with pytest.raises(ValueError, match=f"{name}.* remove .*run .*again") as error:
        READERS[name](work)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", READERS)
def test_damage_is_a_sentence_with_a_remedy(work, name):
    values = ["[" * 100_000, "", "{", "3", "[3]", '{"other": 1}', "null", *map(json.dumps, WRONG[name])]
    for text in values:
        (work / name).write_text(text)
        refused(name, work)
    for content in (b"\xff", b'{"first_shard": ' + b"9" * 10_000 + b"}"):
        (work / name).write_bytes(content)
        refused(name, work)
    (work / name).unlink()
    os.mkfifo(work / name)
    refused(name, work)
    (work / name).unlink()
    os.truncate(os.open(work / name, os.O_CREAT | os.O_RDWR), 30 << 30)
    refused(name, work)


def test_what_is_no_file_is_refused_before_anything_is_written(work):
    check_work_folder(work)
    for name in (*READERS, "00000-examined.jsonl"):
        os.mkfifo(work / name)
        with pytest.raises(
            ValueError, match=f"{name} is a named pipe; expected a file; remove it and run the same com"
        ):
            check_work_folder(work)
        (work / name).unlink()
    (work / "broken link").symlink_to("nowhere")
    check_work_folder(work)


def test_good_files_are_read_as_they_were_written(work):
    shard = FinishedShard(
        ShardRecord(**RECORD), {"a": 1}, ((5, 32, 32, (16, 2, 4, 4), 1),), (("a", 1, "why"),), {"a": 9}
    )
    shard.write(work / "shard-000000.json")
    assert FinishedShard.read(work / "shard-000000.json") == shard
    rewritten = RewrittenShard("old.tar", None, ((5, 32, 32, 1),))
    rewritten.write(work / "rewritten-000001.json")
    assert RewrittenShard.read(work / "rewritten-000001.json") == rewritten
    changes = SourceChanges({"a": "a has changed"}, ("b",))
    (work / "changes.json").write_text(json.dumps(dataclasses.asdict(changes)))
    assert read_work_file(work / "changes.json", SourceChanges) == changes
    (work.parent / RECORD["name"]).touch()
    note_superseded(work, [RECORD["name"]])
    delete_superseded(work.parent, work, MANIFEST)
    assert not (work.parent / RECORD["name"]).exists()
    (work / "round.json").write_text(json.dumps(BATCH))
    ((source, split),) = ShardBatch.read(work).accepted
    assert (source.windows[0].stop, source.size.height, split) == (5, 16, "train")


def test_damaged_lines_of_the_probe_cache_are_of_no_matter(work):
    path, settings, info = work / "00000-examined.jsonl", PrepareSettings(), ClipInfo(5, 5, 16.0, 32.0, 48.0, 1)
    ProbeCache(path, settings).add("a.mp4", 1, 2, "0" * 64, info)
    good = path.read_bytes().strip()
    bad = [b"[" * 100_000, b"\xff", b"3", b"null", b'{"name": []}', b'{"name": "b.mp4"}', good[:-9]]
    for old, new in ((b'"frames": 5', b'"frames": "5"'), (b'"frames": 5,', b""), (b'"0000', b'0,"x":"0000')):
        bad.append(good.replace(b"a.mp4", b"c.mp4").replace(old, new))
        path.write_bytes(b"\n".join([*bad, good, *bad]))
        cache = ProbeCache(path, settings)
        assert cache.find("a.mp4", 1, 2) == ("0" * 64, info)
        assert cache.find("b.mp4", 1, 2) is None
        assert cache.find("c.mp4", 1, 2) is None


def test_a_run_refuses_them_at_once(copies, prepared, tiny_model, settings, silent, monkeypatch):
    out, clips = copies
    work = out / ".wan-data"
    work.mkdir()
    for name, make, said in (
        ("round.json", lambda path: path.write_text("[" * 100_000), "nested more than 100 levels"),
        ("superseded.json", os.mkfifo, "is a named pipe"),
        ("superseded.json", lambda path: path.write_text('{"shards": ["../x"]}'), "no name of a shard"),
        ("00000-examined.jsonl", os.mkfifo, "is a named pipe"),
    ):
        make(work / name)
        with pytest.raises(ValueError, match=f"{name}.*{said}.* remove .*run .*again"):
            prepared(clips, out, tiny_model, settings)
        (work / name).unlink()
    os.mkfifo(work / "00000-examined.jsonl")
    with pytest.raises(ValueError, match="is a named pipe"):
        probe_only([], settings, report=silent, output=out)
    (work / "00000-examined.jsonl").unlink()
    prepared(clips, out, tiny_model, settings)

    # An unfinished batch with a damaged record: no process encodes anything before it is named.
    again = out.parent / "again"
    with monkeypatch.context() as patch:
        patch.setattr(preparation.RewrittenShard, "read", None)
        patch.setattr(preparation, "write_metadata", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepared(clips, again, tiny_model, settings)
    (again / ".wan-data" / "shard-000003.json").write_text('{"record": 3}')
    (again / ".wan-data" / "shard-000000.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "EncoderPool", None)
        with pytest.raises(ValueError, match=r"shard-000003\.json has no .*; remove it and run the same command again"):
            prepared(clips, again, tiny_model, settings)
    (again / ".wan-data" / "shard-000003.json").unlink()
    assert sum(prepared(clips, again, tiny_model, settings).samples.values()) == 14


def test_the_lock_file_of_another_process(tmp_path):
    path = tmp_path / ".wan-data.lock"
    for content, holder in (
        ("process 12", "process 12"),
        ("\x1b[2J", "another process"),
        ("x" * 200, "another process"),
    ):
        path.write_text(content)
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            with pytest.raises(ValueError, match=f"is being written by {holder}; wait"), writer_lock(tmp_path):
                pass
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match="is a named pipe; expected a file"), writer_lock(tmp_path):
        pass


def test_a_folder_in_which_another_process_begins_meanwhile_is_not_of_another_program(tmp_path, monkeypatch):
    listed = Path.iterdir

    def another_begins(folder):
        (folder / "wan-data.json").touch()
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", another_begins)
    with output_folder(tmp_path, Ranks(), overwrite=False):
        pass
    monkeypatch.undo()
    (tmp_path / "wan-data.json").unlink()
    (tmp_path / "other").touch()
    with (
        pytest.raises(ValueError, match="holds files that wan-data did not write"),
        output_folder(tmp_path, Ranks(), overwrite=False),
    ):
        pass
