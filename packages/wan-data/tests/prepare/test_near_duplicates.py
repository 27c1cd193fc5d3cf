"""Near-duplicates among results of probing and the records of an index, whatever files the results are in."""

import dataclasses
import random
from pathlib import Path

import pytest

from wan_data.curation.fingerprints import packed_fingerprint, unpacked_fingerprint
from wan_data.curation.measures import Measures
from wan_data.index.records import ACCEPTED, DUPLICATE, SourceRecord
from wan_data.index.sources import IndexState, SourceIndex, added
from wan_data.prepare.near_duplicates import without_duplicates
from wan_data.prepare.planned_source import PlannedSource
from wan_data.prepare.probing.results import ProbeResults, write_results
from wan_data.prepare.settings import PrepareSettings
from wan_data.video.buckets import Size
from wan_data.video.decode import ClipInfo
from wan_data.video.windows import Window


def hashes_of(seed, bits=0, of=range(8)):
    """Eight hashes from a seed, of which so many bits of those numbered are changed."""
    values = [random.Random(f"{seed} {part}").getrandbits(256) for part in range(8)]
    for part in of:
        for bit in random.Random(f"{seed} {bits} {part}").sample(range(256), bits):
            values[part] ^= 1 << bit
    return tuple(f"{value:064x}" for value in values)


def source(name, hashes, height=64.0, frames=20, size=100, content=None):
    digest = content or random.Random(name).randbytes(32).hex()
    info = ClipInfo(frames, frames, 16.0, height, 96.0, 1)
    measures = Measures(0.1, 0.0, 3.0, 0.0, None, hashes)
    return PlannedSource(name, Path(name), size, digest, "x", info, Size(32, 48), (Window(0, 9),), 7, measures)


def record_of(one, **more):
    return SourceRecord(
        *(one.name, ACCEPTED, None, "train", one.sha256, one.bytes, 1, ("shard-rank00-000001.tar",)),
        frames=one.info.frames, height=one.info.height, width=one.info.width,
        fingerprint=packed_fingerprint(one.measures.hashes), **more,
    )  # fmt: skip


def results_in(folder, sources, files=1):
    folder.mkdir(exist_ok=True)
    paths = [folder / f"results-{number}.sqlite" for number in range(files)]
    for number, path in enumerate(paths):
        write_results(path, sources[number::files])
    return ProbeResults(paths)


def decided(folder, sources, duplicates, files=1, **more):
    """Names of the accepted sources, and of each that is a duplicate the other and the reason."""
    settings = PrepareSettings(duplicates=duplicates)
    with without_duplicates(results_in(folder, sources, files), settings, folder, **more) as results:
        accepted, rejected = list(results.accepted()), list(results.rejected())
        contents = {entry.name: entry.sha256 for entry in results.entries(accepted=True)}
    assert not (folder / "duplicates.sqlite").exists()
    found = {one.name: (one.duplicate_of, one.reason) for one in rejected}
    assert all(one.verdict == DUPLICATE and one.info and one.measures and one.mtime_ns == 7 for one in rejected)
    return [one.name for one in accepted], found, contents, {one.name: one.duplicate_of for one in accepted}


def test_the_best_of_each_group_stays_whatever_files_the_results_are_in(tmp_path):
    rng, sources, best = random.Random(0), [], set()
    for group in range(40):
        some = [
            source(f"clip {rng.random()}", hashes_of(group, bits), *map(rng.choice, ((64.0, 96.0), (20, 40), (1, 2))))
            for bits in range(rng.randrange(1, 6))
        ]
        best.add(min(some, key=lambda one: (-one.info.height, -one.info.frames, -one.bytes, one.name)).name)
        sources += some
    sources.sort(key=lambda one: one.name)
    one = decided(tmp_path / "1", sources, "drop")
    assert one[0] == sorted(best)
    assert {*one[1]} == {source.name for source in sources} - best
    assert {of for of, _ in one[1].values()} <= best
    assert decided(tmp_path / "3", sources, "drop", files=3) == one
    named = decided(tmp_path / "4", sources, "name")
    assert {name: of for name, of in named[3].items() if of} == {name: of for name, (of, _) in one[1].items()}


def test_what_the_dataset_has_stays(tmp_path):
    old, other = source("z old", hashes_of(0), height=32.0), source("gone", hashes_of(1))
    state = added(tmp_path, IndexState(), [record_of(other), record_of(old)])
    new = [source("a new", hashes_of(0, 9), height=640.0), source("b new", hashes_of(1, 3))]
    with SourceIndex.open(tmp_path, state.parts) as index:
        accepted, found, *_ = decided(tmp_path / "work", new, "drop", index=index, replaced=["gone"])
    assert accepted == ["b new"]
    assert found == {"a new": ("z old", "it is a near-duplicate of z old (9 of 256 bits differ)")}


def test_equal_contents_are_duplicates_also_where_nothing_is_to_be_seen(tmp_path):
    black = ("",) * 8
    sources = [source("a", black, content="1" * 64), source("b", black, content="2" * 64),
               source("c", black, content="1" * 64)]  # fmt: skip
    accepted, found, *_ = decided(tmp_path, sources, "drop")
    assert accepted == ["a", "b"]
    assert found["c"][0] == "a"


def test_a_chain_of_near_clips_is_in_one_split_though_its_ends_are_no_duplicates(tmp_path):
    """The second is near the first, and the third near the second only."""
    first, second = hashes_of(0), hashes_of(0, 60, of=range(1, 7))
    third = list(second)
    for part in range(1, 7):
        value = int(second[part], 16)
        for bit in random.Random(f"third {part}").sample(range(256), 60):
            value ^= 1 << bit
        third[part] = f"{value:064x}"
    sources = [source("1", first), source("2", second), source("3", tuple(third))]
    accepted, _, contents, of = decided(tmp_path, sources, "name")
    assert accepted == ["1", "2", "3"]
    assert of == {"1": None, "2": "1", "3": None}
    assert {*contents.values()} == {sources[0].sha256}
    assert decided(tmp_path, sources, "drop")[0] == ["1", "3"]


def test_nothing_is_looked_for_unless_asked(tmp_path):
    results = results_in(tmp_path, [dataclasses.replace(source("a", hashes_of(0)), measures=None)])
    with without_duplicates(results, PrepareSettings(), tmp_path) as same:
        assert same is results


def test_a_fingerprint_is_that_of_its_hashes():
    for hashes in (hashes_of(3), ("", *hashes_of(4)[1:7], ""), ("",) * 8):
        assert unpacked_fingerprint(packed_fingerprint(hashes)) == hashes
    for damaged in ("", "ff" * 256, "zz" * 257):
        with pytest.raises(ValueError, match=r"a fingerprint is .*; expected 514 hexadecimal digits"):
            unpacked_fingerprint(damaged)


def test_a_damaged_fingerprint_in_the_index_is_named(tmp_path):
    one = dataclasses.replace(record_of(source("old", hashes_of(0))), fingerprint="00ff")
    state = added(tmp_path, IndexState(), [one])
    with SourceIndex.open(tmp_path, state.parts) as index, pytest.raises(ValueError, match=r"^old: a fingerprint is"):
        decided(tmp_path / "work", [source("new", hashes_of(1))], "drop", index=index)
