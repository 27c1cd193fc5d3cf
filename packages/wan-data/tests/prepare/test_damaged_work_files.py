"""The files of an unfinished preparation, damaged: one sentence that names the file and what to do, or no matter."""

import contextlib
import dataclasses
import fcntl
import json
import os
import sqlite3
from fractions import Fraction
from pathlib import Path

import pytest
from thread_ranks import ThreadRanks

from wan_data.index.lengths import LengthCounts
from wan_data.index.manifest import Manifest
from wan_data.prepare import local_workers
from wan_data.prepare import run as preparation
from wan_data.prepare.output_folder import output_folder
from wan_data.prepare.planned_source import PlannedSource, RejectedSource
from wan_data.prepare.probing.cache import Found, ProbeCache
from wan_data.prepare.probing.results import ProbeResults, write_results
from wan_data.prepare.probing.stage import gathered, probe_only
from wan_data.prepare.ranks import Ranks
from wan_data.prepare.removal import RewrittenShard, delete_superseded, note_superseded
from wan_data.prepare.results import FinishedShard
from wan_data.prepare.settings import PrepareSettings
from wan_data.prepare.shard_batches import ShardBatch, plan_shard_batch
from wan_data.prepare.work_files import check_work_folder, read_work_file
from wan_data.shards.lock import writer_lock
from wan_data.shards.writer import ShardRecord
from wan_data.sources.changes import SourceChanges
from wan_data.storage.local_copies import LocalCopies
from wan_data.video.buckets import Size
from wan_data.video.decode import ClipInfo
from wan_data.video.windows import Window
from wan_model.latent_spec import LatentSpec

SPEC = LatentSpec(1, 4, 8, (0.0,), (1.0,), 8, 8, "model")
MANIFEST = Manifest(True, "1", SPEC, {})


class TwoRanks(ThreadRanks):
    def __init__(self):
        super().__init__(None, 0, 2)

    def barrier(self, name):
        pass


def source(name):
    info = ClipInfo(5, 5, 16.0, 32.0, 48.0, 1)
    return PlannedSource(name, Path(name), 1, "0", "A clip.", info, Size(16, 16), (Window(0, 5),))


READERS = {
    "superseded.json": lambda work: delete_superseded(work.parent, work, MANIFEST),
    "shard-000000.json": lambda work: FinishedShard.read(work / "shard-000000.json"),
    "rewritten-000001.json": lambda work: RewrittenShard.read(work / "rewritten-000001.json"),
    "changes.json": lambda work: read_work_file(work / "changes.json", SourceChanges),
}
DATABASES = {
    "round.sqlite": lambda work: everything_of(work),
    "results-00001.sqlite": lambda work: [
        *gathered(work, TwoRanks()).accepted(),
        *gathered(work, TwoRanks()).rejected(),
    ],
}


def everything_of(work):
    with contextlib.closing(ShardBatch.open(work)) as batch:
        return [*batch.accepted(), *batch.rejected(), *map(batch.shard, batch.numbers), batch.replaced]


def results_of(work):
    results = gathered(work, TwoRanks())
    return [*results.accepted(), *results.rejected()]


def two_results(work):
    results = [source("a"), RejectedSource("b", "too short")]
    for rank in (0, 1):
        write_results(work / f"results-{rank:05d}.sqlite", results)
    found = ProbeResults([work / "results-00000.sqlite"])
    plan_shard_batch(work, found, PrepareSettings(validation_fraction=0), first_shard=0)


RECORD = {"name": "shard-rank00-000001.tar", "split": "train", "samples": 1, "bytes": 1, "sha256": "0"}
SHARD = {"record": RECORD, "samples": {}, "shapes": [], "dropped": [], "cut": {}}
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
}
# Each makes a value that the readers do not expect, or none.
SQL = {
    "round.sqlite": [
        "DELETE FROM about",
        "UPDATE about SET first_shard = 1.5",
        "UPDATE shards SET samples = 'x'",
        "UPDATE accepted SET source = '['",
        "UPDATE accepted SET source = x'ff'",
        "UPDATE accepted SET source = json_set(source, '$.windows', json('[[0]]'))",
        "UPDATE accepted SET source = json_set(source, '$.caption', 3)",
        "UPDATE accepted SET source = json_set(source, '$.path', char(0))",
        "UPDATE accepted SET source = json_set(source, '$.size.depth', 1)",
        "UPDATE accepted SET source = (SELECT source FROM rejected)",
        "UPDATE rejected SET source = (SELECT source FROM accepted)",
        "CREATE VIEW more AS SELECT 1",
        "DROP TABLE shards",
    ],
    "results-00001.sqlite": [
        "UPDATE results SET value = '[3]'",
        "UPDATE results SET windows = 'x'",
        "UPDATE results SET windows = 1 WHERE name = 'b'",
        "UPDATE results SET value = json_set(value, '$.bytes', NULL)",
        "DROP TABLE results",
    ],
}


@pytest.fixture
def work(tmp_path):
    (tmp_path / ".wan-data").mkdir()
    return tmp_path / ".wan-data"


def refused(name, work):
    with pytest.raises(ValueError, match=f"{name}.* remove .*run .*again") as error:
        {**READERS, **DATABASES}[name](work)
    assert "\n" not in str(error.value)
    assert str(error.value).count("run the same command again") <= 1


@pytest.mark.parametrize(("name", "statement"), [(name, one) for name, all_of in SQL.items() for one in all_of])
def test_a_damaged_database_is_a_sentence_with_a_remedy(work, name, statement):
    two_results(work)
    DATABASES[name](work)
    with contextlib.closing(sqlite3.connect(work / name)) as database:
        database.execute(statement)
        database.commit()
    refused(name, work)


@pytest.mark.parametrize("name", DATABASES)
def test_what_is_no_database_is_a_sentence_with_a_remedy(work, name):
    two_results(work)
    content = (work / name).read_bytes()
    for bad in (b"x", b"[" * 100_000, content[:9_000], content[:100] + bytes(len(content) - 100)):
        (work / name).write_bytes(bad)
        refused(name, work)
    (work / name).unlink()
    os.mkfifo(work / name)
    refused(name, work)


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
    for name in (*READERS, *DATABASES, "00000-examined.sqlite"):
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
        ShardRecord(**RECORD),
        {"a": 1},
        ((5, 32, 32, (16, 2, 4, 4), 1),),
        (("a", 1, "why"),),
        {"a": 9},
        LengthCounts(((3, 1),)),
    )
    shard.write(work / "shard-000000.json")
    assert FinishedShard.read(work / "shard-000000.json") == shard
    rewritten = RewrittenShard("old.tar", None, ((5, 32, 32, 1),), ("a.mp4",), LengthCounts(((3, 1),), ((9, 1),)))
    rewritten.write(work / "rewritten-000001.json")
    assert RewrittenShard.read(work / "rewritten-000001.json") == rewritten
    changes = SourceChanges({"a": "a has changed"}, 2, ("b",), 5)
    (work / "changes.json").write_text(json.dumps(dataclasses.asdict(changes)))
    assert read_work_file(work / "changes.json", SourceChanges) == changes
    (work.parent / RECORD["name"]).touch()
    note_superseded(work, [RECORD["name"]])
    delete_superseded(work.parent, work, MANIFEST)
    assert not (work.parent / RECORD["name"]).exists()


def test_a_damaged_probe_cache_is_of_no_matter(work):
    path, settings = work / "00000-examined.sqlite", PrepareSettings()
    one = Found(1, 2, "0" * 64, ClipInfo(5, 5, 16.0, 32.0, 48.0, 1))

    def found(name="a.mp4", of=settings):
        with contextlib.closing(ProbeCache(path, of)) as cache:
            return cache.find([name]).get(name)

    def filled():
        with contextlib.closing(ProbeCache(path, settings)) as cache:
            for name in ("a.mp4", "b.mp4"):
                cache.add(name, one)
        assert found() == found("b.mp4") == one

    filled()
    content = path.read_bytes()
    assert found(of=PrepareSettings(fps=Fraction(8))) is None
    for bad in (b"x", b"[" * 100_000, content[: len(content) // 2], content[:100] + bytes(len(content) - 100)):
        path.write_bytes(bad)
        assert found() is None
        filled()
    for statement in (
        "UPDATE remembered SET value = '[' WHERE name = 'a.mp4'",
        "UPDATE remembered SET value = json_set(value, '$.info.frames', '5') WHERE name = 'a.mp4'",
        "UPDATE remembered SET value = json_set(value, '$.sha256', 0) WHERE name = 'a.mp4'",
        "UPDATE remembered SET value = '[]' WHERE name = 'a.mp4'",
    ):
        with contextlib.closing(sqlite3.connect(path)) as database:
            database.execute(statement)
            database.commit()
        assert found() is None
        assert found("b.mp4") == one, statement
        filled()
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("DROP TABLE remembered")
        database.execute("CREATE VIEW remembered AS SELECT 'a.mp4' AS name, '{}' AS value")
        database.commit()
    assert found() is None
    filled()


def test_a_run_refuses_them_at_once(copies, prepared, tiny_model, settings, silent, monkeypatch):
    out, clips = copies
    work = out / ".wan-data"
    work.mkdir()
    for name, make, said in (
        ("round.sqlite", lambda path: path.write_text("[" * 100_000), "file is not a database"),
        ("superseded.json", os.mkfifo, "is a named pipe"),
        ("superseded.json", lambda path: path.write_text('{"shards": ["../x"]}'), "no name of a shard"),
        ("00000-examined.sqlite", os.mkfifo, "is a named pipe"),
    ):
        make(work / name)
        with pytest.raises(ValueError, match=f"{name}.*{said}.* remove .*run .*again"):
            prepared(clips, out, tiny_model, settings)
        (work / name).unlink()
    os.mkfifo(work / "00000-examined.sqlite")
    with (
        pytest.raises(ValueError, match="is a named pipe"),
        probe_only([], settings, report=silent, output=out, copies=LocalCopies()),
    ):
        pass
    (work / "00000-examined.sqlite").unlink()
    prepared(clips, out, tiny_model, settings)

    # An unfinished batch with a damaged record: no process encodes anything before it is named.
    again = out.parent / "again"
    with monkeypatch.context() as patch:
        patch.setattr(preparation.RewrittenShard, "read", None)
        patch.setattr("wan_data.prepare.outputs.write_metadata", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepared(clips, again, tiny_model, settings)
    (again / ".wan-data" / "shard-000003.json").write_text('{"record": 3}')
    (again / ".wan-data" / "shard-000000.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(local_workers, "EncoderPool", None)
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
