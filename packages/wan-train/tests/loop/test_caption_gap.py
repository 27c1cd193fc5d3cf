"""Which caption a sample gets for the caption gap, and the gap of a model that is known to follow captions.

That the engine computes what plain torch does is for test_plain_training.py.
"""

import random
from pathlib import Path

import pytest
import torch
from training_runs import RUN_OPTIONS, read_log, run
from warm_ranks import Call

from wan_model.pack import PackedText
from wan_train.loop.caption_gap import caption_id, partners


def ids_of(captions: str) -> list[bytes]:
    return [letter.encode() for letter in captions]


@pytest.mark.parametrize("captions", ["abcdefg", "aabbcc", "aaabbbc", "ab", "aaabcd", "abcabcabcz"])
def test_every_sample_gets_a_caption_that_differs_and_each_is_given_once(captions: str) -> None:
    keys = [f"key-{number}" for number in range(len(captions))]
    for seed in range(5):
        found = partners(keys, ids_of(captions), seed)
        assert sorted(other for other in found if other is not None) == list(range(len(keys)))
        assert all(captions[other] != own for other, own in zip(found, captions, strict=True) if other is not None)


def test_samples_without_a_different_caption_are_left_out() -> None:
    found = partners(["a", "b", "c", "d"], ids_of("xxxy"), 1)
    assert sum(other is None for other in found) == 2
    assert found[3] in (0, 1, 2)
    assert found.count(3) == 1
    assert partners(["a", "b", "c"], ids_of("xxx"), 1) == [None, None, None]
    assert partners(["a"], ids_of("x"), 1) == [None]
    assert partners([], [], 1) == []


def test_the_pairs_depend_on_keys_and_seed_and_not_on_the_order() -> None:
    keys, captions = [f"key-{number}" for number in range(9)], ids_of("aabcdefgh")
    chosen = partners(keys, captions, 7)
    wanted = {key: keys[other] for key, other in zip(keys, chosen, strict=True) if other is not None}
    order = list(range(9))
    random.Random(0).shuffle(order)
    shuffled = [keys[place] for place in order]
    again = partners(shuffled, [captions[place] for place in order], 7)
    assert {key: shuffled[other] for key, other in zip(shuffled, again, strict=True) if other is not None} == wanted
    assert partners(keys, captions, 8) != chosen


def test_captions_are_compared_by_their_embeddings() -> None:
    one, other = torch.ones(3, 4), torch.ones(4, 4)
    assert caption_id(PackedText.of([one], 8)) == caption_id(PackedText.of([one.clone()], 16))
    assert caption_id(PackedText.of([one], 8)) != caption_id(PackedText.of([2 * one], 8))
    assert caption_id(PackedText.of([one], 8)) != caption_id(PackedText.of([other], 8))


def test_the_gap_of_a_model_that_errs_twice_as_much_with_other_captions_is_four(tmp_path: Path) -> None:
    """Seven samples in packs of one or two over two ranks; errors are squared."""
    options = ("validation.interval=2", "validation.samples=7", "dataset.capacity=48", "--nproc-per-node", "2")
    ended = run((*RUN_OPTIONS, *options, "train.train_iters=2"), tmp_path, calls=[Call("rank_calls:follow_captions")])
    assert ended.codes == [0, 0], ended.errors
    (entry,) = [entry for entry in read_log(tmp_path) if entry.get("event") == "validation"]
    assert entry["samples"] == 7
    assert entry["loss"] == pytest.approx(1, rel=1e-5)
    assert entry["caption_gap"] == pytest.approx(4, rel=1e-5)
