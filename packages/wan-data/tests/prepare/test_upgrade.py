"""Datasets of the first format are read as they are, and turned into today's."""

import itertools
import shutil

import pytest
from click.testing import CliRunner
from dataset_sources import records_of
from earlier_format import as_format_1
from folder_digests import without_index

from wan_data.cli import main
from wan_data.index.manifest import open_sources, read_manifest
from wan_data.inspect.statistics import inspect
from wan_data.inspect.verify import verify
from wan_data.prepare.settings import PrepareSettings
from wan_data.reading.loader import LoaderConfig, PackLoader
from wan_data.sources.modification_times import source_times


@pytest.fixture
def earlier(dataset, tmp_path):
    return as_format_1(dataset, tmp_path / "earlier")


def packs(folder):
    return [
        pack.keys
        for pack in itertools.islice(PackLoader(LoaderConfig(str(folder), capacity=200), rank=0, world_size=1), 6)
    ]


def test_a_dataset_of_the_first_format_is_read_as_it_is(earlier, dataset, clips):
    before = (earlier / "wan-data.json").read_bytes()
    old, new = read_manifest(earlier), read_manifest(dataset)
    assert (old.format_version, old.index.counts, old.shards, old.shapes) == (
        1,
        new.index.counts,
        new.shards,
        new.shapes,
    )
    with open_sources(earlier, old) as index:
        assert list(index.records()) == records_of(dataset)
    assert packs(earlier) == packs(dataset)
    assert verify(earlier, sources=clips) == verify(dataset, sources=clips)
    # What the manifest of today counts is what the samples of either say.
    assert {**inspect(earlier), "path": ""} == {**inspect(dataset), "path": ""}
    assert (earlier / "wan-data.json").read_bytes() == before


def test_upgrading_gives_what_would_have_been_prepared_today(
    earlier, dataset, clips, prepared, tiny_model, small, silent
):
    done = CliRunner().invoke(main, ["upgrade", str(earlier)])
    assert (done.exit_code, done.stdout) == (0, f"{earlier}: 6 sources, 5 shards, now of format 2\n")
    assert without_index(earlier) == without_index(dataset)
    assert records_of(earlier) == records_of(dataset)
    with source_times(earlier) as one, source_times(dataset) as other:
        names = [record.path for record in records_of(dataset)]
        assert one.find(names) == other.find(names) != {}
    again = CliRunner().invoke(main, ["upgrade", str(earlier)])
    assert (again.exit_code, again.stdout) == (0, f"{earlier} is of format 2 already\n")
    prepared(clips, earlier, tiny_model, PrepareSettings(**small), report=silent)
    assert silent.lines == [], "nothing is read or encoded again"


def test_a_preparation_upgrades_what_it_adds_to(
    earlier, dataset, clips, clip, prepared, tiny_model, small, silent, tmp_path
):
    more, today = shutil.copytree(clips, tmp_path / "more"), shutil.copytree(dataset, tmp_path / "today")
    clip(more / "new.mkv", range(100, 118), size=(48, 64))
    (more / "new.txt").write_text("New.")
    for folder in (earlier, today):
        manifest = prepared(more, folder, tiny_model, PrepareSettings(**small), report=silent)
        assert manifest.index.counts.total == 7
    assert without_index(earlier) == without_index(today)
    assert "turning the dataset into format 2, as wan-data upgrade does" in silent.lines


@pytest.mark.parametrize("stop", ["write_part", "source_times", "Manifest.write"])
def test_an_interrupted_upgrade_leaves_the_dataset_as_it_was(earlier, dataset, clips, stop, monkeypatch):
    place = {
        "write_part": "wan_data.index.sources.write_part",
        "source_times": "wan_data.prepare.upgrade.source_times",
        "Manifest.write": "wan_data.index.manifest.Manifest.write",
    }[stop]
    with monkeypatch.context() as patch:
        patch.setattr(place, lambda *_, **__: 1 / 0)
        assert isinstance(CliRunner().invoke(main, ["upgrade", str(earlier)]).exception, ZeroDivisionError)
    assert read_manifest(earlier).format_version == 1
    assert packs(earlier) == packs(dataset)
    assert CliRunner().invoke(main, ["upgrade", str(earlier)]).exit_code == 0
    assert without_index(earlier) == without_index(dataset)
    assert verify(earlier, sources=clips)[1] == []


def test_a_damaged_shard_is_no_obstacle(earlier):
    shard = earlier / "shard-rank00-000001.tar"
    shard.write_bytes(b"x" * shard.stat().st_size)
    assert CliRunner().invoke(main, ["upgrade", str(earlier)]).exit_code == 0
    assert read_manifest(earlier).lengths is None
    assert any("shard-rank00-000001.tar" in problem for problem in verify(earlier)[1])


def test_the_plan_of_an_earlier_version_is_named(prepared, clips, tiny_model, small, tmp_path):
    (tmp_path / "out" / ".wan-data").mkdir(parents=True)
    (tmp_path / "out" / ".wan-data" / "round.json").write_text("{}")
    with pytest.raises(ValueError, match=r"round\.json is the plan of an earlier version; finish .* or remove the fol"):
        prepared(clips, tmp_path / "out", tiny_model, PrepareSettings(**small))
