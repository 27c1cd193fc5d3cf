"""The index of sources: later files hide earlier ones, few files, nothing rewritten whole."""

import random
import sqlite3

import pytest

from wan_data.index import sources as index_sources
from wan_data.index.part import Part, row_of
from wan_data.index.records import ACCEPTED, REJECTED, REMOVED, SourceRecord
from wan_data.index.sources import IndexState, SourceIndex, added, counted, delete_unlisted


def record(path, verdict=ACCEPTED, content=None, **more):
    if verdict == ACCEPTED:
        more = {"split": "train", "samples": 2, "shards": ("shard-rank00-000001.tar",), **more}
    return SourceRecord(path, verdict, sha256=content or random.Random(path).randbytes(32).hex(), **more)


def records(folder, state):
    with SourceIndex.open(folder, state.parts) as index:
        return list(index.records())


def test_a_history_of_changes_leaves_what_a_dictionary_would(tmp_path):
    rng, state, truth = random.Random(0), IndexState(), {}
    for _ in range(40):
        changes = {}
        for _ in range(rng.choice([1, 3, 10, 50])):
            path, verdict = f"clip {rng.randrange(300)} ü.mp4", rng.choice([ACCEPTED, REJECTED, REMOVED])
            more = {"split": rng.choice(["train", "val"]), "dropped": ((1, "bäd"),) * rng.randrange(2)}
            changes[path] = record(path, verdict, rng.randbytes(32).hex(), **(more if verdict == ACCEPTED else {}))
        state = added(tmp_path, state, [changes[path] for path in sorted(changes)])
        for path, one in changes.items():
            truth.pop(path, None)
            truth |= {} if one.verdict == REMOVED else {path: one}
        delete_unlisted(tmp_path, state.parts)
        with SourceIndex.open(tmp_path, state.parts) as index:
            assert list(index.records()) == [truth[path] for path in sorted(truth)]
            assert index.find(f"clip {number} ü.mp4" for number in range(301)) == truth
            assert list(index.rejects()) == [one for one in index.records() if one.verdict == REJECTED]
            assert [one.path for one in index.notable()] == sorted(
                path for path, one in truth.items() if one.verdict == REJECTED or one.dropped
            )
            contents = {one.sha256: one.split for one in truth.values() if one.split}
            assert index.splits_of([*contents, "0" * 64]) == contents
        assert state.counts == counted(truth.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(part.name for part in state.parts)


def test_a_content_that_no_source_has_any_more_is_forgotten(tmp_path):
    state = added(tmp_path, IndexState(), [record("a", content="a" * 64, split="val")])
    state = added(tmp_path, state, [record("a", content="b" * 64)])
    with SourceIndex.open(tmp_path, state.parts) as index:
        assert index.splits_of(["a" * 64, "b" * 64]) == {"b" * 64: "train"}


def test_adding_writes_what_is_new_and_leaves_the_files_that_are_there(tmp_path):
    """Written records of 100 additions of 10 to 10,000: each some times more often than once, few files."""
    state = added(tmp_path, IndexState(), [record(f"{number:05d}") for number in range(10_000)])
    (first,) = state.parts
    written = 0
    for run in range(100):
        before = {*state.parts}
        state = added(tmp_path, state, [record(f"new {run:03d} {number}") for number in range(10)])
        written += sum(part.records for part in {*state.parts} - before)
        assert state.parts[0] == first
        assert len(state.parts) < 10
    assert state.counts.total == 11_000
    assert written < 8 * 1_000


def test_what_says_nothing_new_writes_nothing(tmp_path):
    state = added(tmp_path, IndexState(), [record("a"), record("b", REJECTED, reason="why")])
    assert added(tmp_path, state, [record("a"), record("b", REJECTED, reason="why"), record("c", REMOVED)]) == state
    assert [path.name for path in tmp_path.iterdir()] == [state.parts[0].name]


@pytest.mark.parametrize("stop", ["write_part", "unlink"])
def test_an_interrupted_addition_changes_nothing_and_can_be_repeated(tmp_path, monkeypatch, stop):
    first = added(tmp_path, IndexState(), [record("a"), record("b")])
    new = [record("b", REMOVED), record("c")]
    calls = []

    def after_the_first(*arguments):
        calls.append(arguments)
        if len(calls) > 1:
            raise OSError("no space")
        return original(*arguments)

    original = index_sources.write_part
    with monkeypatch.context() as patch:
        if stop == "unlink":
            patch.setattr("pathlib.Path.unlink", lambda *_, **__: 1 / 0)
        else:
            patch.setattr(index_sources, "write_part", after_the_first)
        with pytest.raises((OSError, ZeroDivisionError)):
            added(tmp_path, first, new)
    assert [one.path for one in records(tmp_path, first)] == ["a", "b"]
    state = added(tmp_path, first, new)
    assert [one.path for one in records(tmp_path, state)] == ["a", "c"]
    delete_unlisted(tmp_path, state.parts)
    assert records(tmp_path, state) == records(tmp_path, added(tmp_path / "", IndexState(), [record("a"), record("c")]))


def test_the_queries_use_the_indices(tmp_path):
    (part,) = added(tmp_path, IndexState(), [record("a")]).parts
    database, seen = Part.open(tmp_path, part), []
    database._database.set_trace_callback(seen.append)
    [*database.find(["a"]), *database.find_contents(["a" * 64]), *database.notable()]
    plans = [" ".join(row[3] for row in database._database.execute(f"EXPLAIN QUERY PLAN {query}")) for query in [*seen]]
    assert ["PRIMARY KEY" in plans[0], "INDEX contents" in plans[1], "INDEX notable" in plans[2]] == [True] * 3
    database.close()


def test_a_row_holds_every_field_of_a_record():
    one = SourceRecord(
        *("a", ACCEPTED, "r", "val", "0" * 64, 1, 2, ("s",), ((1, "x"),), 3, 24.5, 5.0, 6.0, "not a digest", 7),
        *(8, 1, 9, 0.1, 0.2, 3.0, 0.4, (5,), "0f", "b"),
    )
    assert None not in row_of(one)
    part = Part.of_records([one], "it")
    assert list(part.find(["a"])) == [one]
    part.close()


def test_rows_keep_their_digest_whatever_sqlite_does_with_the_file(tmp_path):
    (part,) = added(tmp_path, IndexState(), [record(f"{number}") for number in range(9)]).parts
    database = sqlite3.connect(tmp_path / part.name)
    database.execute("PRAGMA page_size = 512")
    database.execute("VACUUM")
    database.close()
    again = Part.open(tmp_path, part)
    assert again.digest() == (part.records, part.digest)
    again.close()
