"""Energon's metadata, damaged: one sentence that names the file and how to make it anew, at once."""

import json
import os
import shutil
import sqlite3
import struct
import time

import pytest
import torch
from latent_shards import write_latent_shards
from ways_to_read import WAYS, little_memory

from wan_data.shards.energon_metadata import restore_metadata
from wan_data.shards.writer import ShardRecord

SHARD = "shard-rank00-000000.tar"
INDEX, INFO, SPLIT, DATABASE = f"{SHARD}.idx", ".nv-meta/.info.json", ".nv-meta/split.yaml", ".nv-meta/index.sqlite"
REMEDY = "run wan-data prepare again"
COUNTS = {SHARD: 3, "shard-rank00-000001.tar": 3}


@pytest.fixture(scope="session")
def indexed(once):
    def build(path):
        latents = [torch.zeros(16, 1, 2, 2), torch.zeros(16, 1, 2, 2), torch.zeros(16, 1, 8, 8)]
        write_latent_shards(path, [("train", latents), ("train", latents[::-1])])

    return once("indexed", build)


@pytest.fixture
def copy(indexed, tmp_path):
    return shutil.copytree(indexed, tmp_path / "copy")


@pytest.fixture(autouse=True)
def at_once():
    start = time.process_time()
    with little_memory():
        yield
    assert time.process_time() - start < 20


def refusals(folder):
    found = {}
    for way, read in WAYS.items():
        try:
            read(folder)
        except ValueError as error:
            found[way] = str(error)
            assert "\n" not in found[way].replace("\\n", "")
    return found


def offsets(change):
    def damage(folder):
        path = folder / INDEX
        old = struct.unpack("<4Q", path.read_bytes())
        new = change(old)
        path.write_bytes(new if isinstance(new, bytes) else struct.pack(f"<{len(new)}Q", *new))

    return damage


def instead(make):
    def damage(folder):
        (folder / INDEX).unlink()
        make(folder / INDEX)

    return damage


OFFSETS = {
    "missing": instead(lambda path: None),
    "a pipe": instead(os.mkfifo),
    "a folder": instead(os.mkdir),
    "gigabytes": lambda folder: os.truncate(folder / INDEX, 30 << 30),
    "empty": offsets(lambda old: b""),
    "cut": offsets(lambda old: old[:-1]),
    "cut within a number": offsets(lambda old: struct.pack("<4Q", *old)[:-3]),
    "longer": offsets(lambda old: [*old, old[-1] + 512]),
    "zeros": offsets(lambda old: [0] * 4),
    "beyond the end": offsets(lambda old: [*old[:-1], 1 << 62]),
    "descending": offsets(lambda old: old[::-1]),
    "between blocks": offsets(lambda old: [old[0], *(place + 7 for place in old[1:-1]), old[-1]]),
    "between members": offsets(lambda old: [old[0], old[1] + 1024, *old[2:]]),
    "of another shard": lambda folder: shutil.copy(folder / "shard-rank00-000001.tar.idx", folder / INDEX),
}


@pytest.mark.parametrize("name", OFFSETS)
def test_offsets(copy, name):
    OFFSETS[name](copy)
    found = refusals(copy)
    # Only the loader uses the file.
    assert set(found) == {"load", "verify"}
    for said in found.values():
        assert ".idx" in said
        assert REMEDY in said
    if name in ("zeros", "descending"):
        assert "its offsets do not ascend" in found["verify"]


def changed(statement):
    def damage(folder):
        with sqlite3.connect(folder / DATABASE) as database:
            database.executescript(statement)
        database.close()

    return damage


DATABASES = {
    "missing": lambda folder: (folder / DATABASE).unlink(),
    "empty": lambda folder: (folder / DATABASE).write_bytes(b""),
    "cut": lambda folder: os.truncate(folder / DATABASE, 5000),
    "noise": lambda folder: (folder / DATABASE).write_bytes(bytes(range(256)) * 40),
    "without a row": changed("DELETE FROM samples WHERE rowid = 2"),
    "an offset beyond the end": changed("UPDATE samples SET byte_offset = 1 << 60 WHERE rowid = 2"),
    "a negative offset": changed("UPDATE samples SET byte_offset = -512 WHERE rowid = 2"),
    "a number beyond the shards": changed("UPDATE samples SET tar_file_id = 9 WHERE rowid = 2"),
    "text for numbers": changed("UPDATE samples SET byte_size = 'many' WHERE rowid = 2"),
    "another's samples": changed("UPDATE samples SET sample_key = 'other' || sample_key"),
    "an endless view": changed(
        "DROP TABLE samples; CREATE VIEW samples AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i FROM n) "
        "SELECT i tar_file_id, i sample_key, i sample_index, i byte_offset, i byte_size FROM n"
    ),
}


@pytest.mark.parametrize("name", DATABASES)
def test_the_database(copy, name):
    DATABASES[name](copy)
    # Neither loader uses it; Energon's own tools do.
    ((way, said),) = refusals(copy).items()
    assert way == "verify"
    assert "index.sqlite" in said
    assert REMEDY in said


def counting(**counts):
    return json.dumps({"shard_counts": {**COUNTS, **counts}})


INFOS = {
    "empty": "",
    "no object": "[1]",
    "no counts": "{}",
    "a list": '{"shard_counts": [1]}',
    "nested": "[" * 100_000,
    "a million lists": '{"shard_counts": [' + "[]," * 10_000_000 + "0]}",
    "negative": counting(**{SHARD: -1}),
    "fraction": counting(**{SHARD: 3.0}),
    "true": counting(**{SHARD: True}),
    "text": counting(**{SHARD: "3"}),
    "huge": counting(**{SHARD: 10**18}),
    "digits": '{"shard_counts": {"' + SHARD + '": ' + "9" * 10_000 + "}}",
    "of another dataset": '{"shard_counts": {"other.tar": 3}}',
    "of too few shards": '{"shard_counts": {"' + SHARD + '": 3}}',
}


@pytest.mark.parametrize("name", INFOS)
def test_counts(copy, name):
    (copy / INFO).write_text(INFOS[name])
    found = refusals(copy)
    assert set(found) == set(WAYS)
    for said in found.values():
        assert ".info.json" in said
        assert REMEDY in said


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize("file", [INFO, SPLIT, ".nv-meta/dataset.yaml"])
def test_something_else_in_the_place_of_a_file(copy, file, make):
    (copy / file).unlink()
    make(copy / file)
    found = refusals(copy)
    assert set(found) == set(WAYS)
    assert all(file.rpartition("/")[2] in said and REMEDY in said for said in found.values())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- a\n",
        "split_parts:\nexclude: []\n",
        "split_parts: {train: x}\nexclude: []\n",
        "split_parts: {train: [[a]]}\nexclude: []\n",
        "split_parts: {train: [1]}\nexclude: []\n",
        "split_parts: {1: [a]}\n",
        "split_parts:\n  train:\nexclude: []\n",
        "split_parts:\n  train:\n  - other.tar\nexclude: []\n",
        "[" * 100_000,
        "split_parts: {train: [" + "a," * 5_000_000 + "]}\n",
    ],
)
def test_splits(copy, text):
    (copy / SPLIT).write_text(text)
    found = refusals(copy)
    assert set(found) == set(WAYS)
    assert all("split.yaml" in said and REMEDY in said for said in found.values()), found


DAMAGE = {
    **{f"offsets {name}": damage for name, damage in OFFSETS.items() if not name.startswith(("between", "of ", "d"))},
    **{name: DATABASES[name] for name in ("missing", "empty", "noise", "without a row")},
    "counts": lambda folder: (folder / INFO).write_text("{}"),
    "no folder": lambda folder: shutil.rmtree(folder / ".nv-meta"),
    "a file": lambda folder: (shutil.rmtree(folder / ".nv-meta"), (folder / ".nv-meta").touch()),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_metadata_is_written_anew(copy, indexed, name):
    shards = [ShardRecord(shard, "train", count, 0, "") for shard, count in COUNTS.items()]
    assert not restore_metadata(copy, shards)
    DAMAGE[name](copy)
    if name in ("offsets zeros", "offsets beyond the end"):
        assert not restore_metadata(copy, shards)  # of the right size: only verify looks into it
        return
    assert restore_metadata(copy, shards)
    assert refusals(copy) == {}
    for path in (*indexed.rglob("*.idx"), indexed / INFO, indexed / SPLIT):
        assert (copy / path.relative_to(indexed)).read_bytes() == path.read_bytes()
