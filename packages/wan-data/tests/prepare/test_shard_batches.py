"""Planning shards: splits that follow from the content, and a plan that a resumed run reads back."""

import contextlib
import dataclasses
from fractions import Fraction
from pathlib import Path

import pytest

from wan_data.prepare.planned_source import PlannedSource, RejectedSource
from wan_data.prepare.probing.results import ProbeResults, write_results
from wan_data.prepare.settings import PrepareSettings
from wan_data.prepare.shard_batches import ShardBatch, encode_tasks, plan_shard_batch, with_splits
from wan_data.video.buckets import Size
from wan_data.video.decode import ClipInfo
from wan_data.video.windows import Window

SIZE = Size(32, 48)
SETTINGS = PrepareSettings(validation_fraction=0.3, samples_per_shard=4, fps=Fraction(16))


def source(name, content=None, windows=2, size=SIZE):
    cut = tuple(Window(5 * i, 5 * i + 5) for i in range(windows))
    info = ClipInfo(5 * windows, 5 * windows, 16.0, 32.0, 48.0, 1)
    return PlannedSource(name, Path(name), 100, content or name, "A clip.", info, size, cut)


def splits(results, known=None, settings=SETTINGS):
    return {
        one.name: split for one, split in with_splits(results, settings, None if known is None else lambda _: known)
    }


@contextlib.contextmanager
def planned(folder, results, settings=SETTINGS, **more):
    write_results(folder / "results.sqlite", results)
    plan_shard_batch(folder, ProbeResults([folder / "results.sqlite"]), settings, **{"first_shard": 0, **more})
    with contextlib.closing(ShardBatch.open(folder)) as batch:
        yield batch


def test_both_splits_get_a_source_where_there_are_two():
    for seed in range(20):
        settings = PrepareSettings(validation_fraction=0.01, seed=seed)
        assert sorted(splits([source("a"), source("b")], settings=settings).values()) == ["train", "val"]
        assert splits([source("a")], settings=settings) == {"a": "train"}
    none = PrepareSettings(validation_fraction=0)
    assert set(splits([source("a"), source("b")], settings=none).values()) == {"train"}


def test_a_known_content_keeps_its_split_whatever_its_draw():
    # In the first batch the rule above may place a source elsewhere than its draw, so only memory keeps copies there.
    for split in ("train", "val"):
        known = {f"c{number}": split for number in range(50)}
        copies = [source(f"copy{number}", f"c{number}") for number in range(50)]
        assert set(splits(copies, known).values()) == {split}


def test_equal_contents_are_in_one_split_and_new_files_move_none():
    first = [source(f"s{number}") for number in range(40)]
    before = splits(first)
    assert 4 <= list(before.values()).count("val") <= 20
    copies = [source(f"copy of {one.name}", one.sha256) for one in first]
    together = splits(first + copies)
    for one in first:
        assert together[one.name] == together[f"copy of {one.name}"]
    # In a later batch a new content has the split that it would have anywhere.
    alone = {one.name: splits([one], known={"another": "train"})[one.name] for one in first}
    assert splits(first, known={"another": "train"}) == alone
    assert sum(alone[name] != before[name] for name in alone) <= 2, "the first batch may move one source to each side"


@pytest.mark.parametrize("most", [1, 3, 4, 100])
def test_shards_hold_every_window_once_and_split_by_split(tmp_path, most):
    settings = dataclasses.replace(SETTINGS, samples_per_shard=most)
    sources = [source(f"s{number:02d}", windows=1 + 3 * number % 11) for number in range(20)]
    with planned(tmp_path, sources, settings, first_shard=7) as batch:
        plans = [batch.shard(number) for number in batch.numbers]
        accepted = list(batch.accepted())
        assert batch.samples(batch.numbers) == sum(len(one.windows) for one in sources)
        for split in ("train", "val"):
            assert batch.numbers_of(split) == [plan.number for plan in plans if plan.split == split]
    assert [plan.number for plan in plans] == list(range(7, 7 + len(plans)))
    windows = [(plan.split, one.name, number) for plan in plans for one, number in plan.windows()]
    wanted = {(split, one.name, number) for one, split in accepted for number in range(len(one.windows))}
    assert len(windows) == len(set(windows))
    assert set(windows) == wanted
    for split in ("train", "val"):
        assert [plan.samples for plan in plans if plan.split == split][:-1] == [most] * (
            sum(plan.split == split for plan in plans) - 1
        )


def test_a_plan_is_read_back_as_it_was_written(tmp_path):
    results = [source("a"), source("b"), RejectedSource("c", "too short")]
    assert ShardBatch.open(tmp_path) is None
    with planned(tmp_path, results, first_shard=3, replaced=["a"], removed=["x", "y"]) as batch:
        assert {one for one, _ in batch.accepted()} == {*results[:2]}
        assert list(batch.rejected()) == results[2:]
        assert (batch.numbers, batch.replaced, batch.removed) == (range(3, 5), ("a",), ("x", "y"))
    (tmp_path / "round.sqlite").write_text('{"first_shard": 3}')
    with pytest.raises(
        ValueError, match=r"round\.sqlite is damaged: file is not a database; remove the folder .*again"
    ):
        ShardBatch.open(tmp_path)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_tasks_hold_one_frame_size_and_every_window_once(tmp_path, batch_size):
    sizes = [Size(32, 48), Size(48, 32)]
    sources = [source(f"s{number}", windows=1 + number % 3, size=sizes[number % 2]) for number in range(12)]
    with planned(tmp_path, sources, PrepareSettings(validation_fraction=0)) as batch:
        plan = batch.shard(0)
    tasks = encode_tasks(plan, batch_size)
    for task in tasks:
        assert len({part.source.size for part in task.parts}) == 1
    found = [(part.source.name, number) for task in tasks for part in task.parts for number in part.windows]
    assert sorted(found) == sorted((one.name, number) for one, number in plan.windows())
    if batch_size > 1:
        sizes_of_tasks = [sum(len(part.windows) for part in task.parts) for task in tasks]
        assert sum(size < batch_size for size in sizes_of_tasks) <= 2, "at most one task of each size is not full"
