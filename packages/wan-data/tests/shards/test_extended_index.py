"""Energon's metadata of a dataset that grows: what was there is neither read nor written again."""

import contextlib
import shutil
import sqlite3

import pytest
import yaml

from wan_data.index.manifest import read_manifest
from wan_data.shards import energon_index
from wan_data.shards.energon_metadata import write_metadata


@pytest.fixture
def grown(dataset, tmp_path):
    """A copy of a dataset whose metadata is of its first three shards, and the records of all."""
    shutil.copytree(dataset, tmp_path / "copy")
    shards = read_manifest(dataset).shards
    write_metadata(tmp_path / "copy", shards[:3])
    return tmp_path / "copy", shards


def dump(folder):
    with contextlib.closing(sqlite3.connect(folder / ".nv-meta" / "index.sqlite")) as database:
        return sorted(database.iterdump())


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in (*(folder / ".nv-meta").iterdir(), *folder.glob("*.idx"))
        if path.suffix != ".sqlite"
    }


def same(folder, dataset):
    return dump(folder) == dump(dataset) and files(folder) == files(dataset)


def test_new_shards_are_added_and_the_others_are_not_read(grown, dataset, monkeypatch):
    folder, shards = grown
    for shard in shards[:3]:
        (folder / shard.name).write_bytes(b"not read")
    write_metadata(folder, shards, shards[:3])
    assert same(folder, dataset)


@pytest.mark.parametrize("shards_before", [3, 5])
def test_an_interrupted_addition_is_undone_or_taken_up(grown, dataset, monkeypatch, shards_before):
    """Interrupted at its second shard, or after the index and before the manifest."""
    folder, shards = grown
    before, add = dump(folder), energon_index._add_shard

    def full(database, of, number, shard):
        if number == 4:
            raise OSError(28, "no space left")
        add(database, of, number, shard)

    if shards_before == 3:
        with monkeypatch.context() as patch:
            patch.setattr(energon_index, "_add_shard", full)
            with pytest.raises(OSError, match="no space left"):
                write_metadata(folder, shards, shards[:3])
        assert dump(folder) == before
    else:
        write_metadata(folder, shards, shards[:3])
    write_metadata(folder, shards, shards[:3])
    assert same(folder, dataset)


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM samples WHERE tar_file_id = 2",
        "DROP TABLE sample_parts",
        "CREATE TABLE more (x)",
        "UPDATE samples SET tar_file_id = 9 WHERE tar_file_id = 2",
        None,
    ],
)
def test_an_index_of_anything_else_is_written_anew(grown, dataset, damage):
    folder, shards = grown
    index = folder / ".nv-meta" / "index.sqlite"
    if damage is None:
        index.write_bytes(b"no database")
    else:
        with contextlib.closing(sqlite3.connect(index)) as database:
            database.execute(damage)
            database.commit()
    write_metadata(folder, shards, shards[:3])
    assert same(folder, dataset)


def test_shards_that_take_the_place_of_others_are_not_added(grown, dataset):
    folder, shards = grown
    write_metadata(folder, shards[:1] + shards[2:], shards[:3])
    alone = shutil.copytree(folder, folder.with_name("alone"))
    shutil.rmtree(alone / ".nv-meta")
    write_metadata(alone, shards[:1] + shards[2:])
    assert same(folder, alone)


def test_the_text_files_are_those_of_a_yaml_writer(dataset):
    meta, shards = dataset / ".nv-meta", read_manifest(dataset).shards
    splits = {split: [shard.name for shard in shards if shard.split == split] for split in ("train", "val", "test")}
    wanted = yaml.safe_dump({"split_parts": splits, "exclude": []}, sort_keys=False)
    assert (meta / "split.yaml").read_text() == wanted
    counts = {"shard_counts": {shard.name: shard.samples for shard in shards}}
    assert (meta / ".info.yaml").read_text() == yaml.safe_dump(counts)
