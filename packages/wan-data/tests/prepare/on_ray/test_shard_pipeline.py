"""The bound on the frames that are under way, with actors that never come to encode them."""

import contextlib

import pytest

pytest.importorskip("ray", reason="the extra ray is not installed")  # before the modules that import it

from wan_data.prepare.on_ray.actor_pool import Outcome
from wan_data.prepare.on_ray.layout import Stage
from wan_data.prepare.on_ray.shard_pipeline import Pools, ShardPipeline
from wan_data.prepare.shard_batches import ShardBatch, plan_shard_batch


class Actors:
    """A pool whose actors keep what they are given."""

    def __init__(self, actors, most):
        self.stage, self._most = Stage("stage", actors, 1.0), most
        self.given = [[] for _ in range(actors)]

    @property
    def calls(self):
        return sum(map(len, self.given))

    def free(self):
        return (number for number, calls in enumerate(self.given) if len(calls) < self._most)

    def call(self, member, item, method, *arguments, returns=1):
        self.given[member].append(item)


@pytest.fixture
def make_pipeline(probed_clips, settings, silent, tmp_path):
    """A pipeline with so many decoding and encoding actors, and its pools."""
    plan_shard_batch(tmp_path, probed_clips, settings, first_shard=0)

    def make(decoders, encoders):
        pools = Pools(Actors(decoders, 1), Actors(encoders, 2), Actors(1, 1), Actors(1, 1))
        return ShardPipeline(map(batch.shard, batch.numbers), pools, settings, silent), pools

    with contextlib.closing(ShardBatch.open(tmp_path)) as batch:
        yield make


@pytest.mark.parametrize(("decoders", "encoders"), [(1, 1), (3, 2)])
def test_decoding_waits_for_the_encoding_actors(decoders, encoders, make_pipeline):
    pipeline, pools = make_pipeline(decoders, encoders)
    decoded = 0
    for _ in range(50):
        pipeline._open_shards()
        pipeline._give_calls()
        for member, calls in enumerate(pools.decode.given):
            for item in calls[:]:
                calls.remove(item)
                decoded += 1
                keys = ((f"{decoded}", 0),)
                assert not [*pipeline._end(Outcome(pools.decode, member, item, keys, "frames"))]
    assert pools.encode.calls == 2 * encoders
    assert decoded == decoders + 2 * encoders


def test_what_an_earlier_attempt_has_decoded_is_not_taken(make_pipeline):
    pipeline, pools = make_pipeline(1, 1)
    pipeline._open_shards()
    pipeline._give_calls()
    work, attempt = item = pools.decode.given[0].pop()
    pipeline._begin_again(work, "a node was lost")
    assert work.attempt == attempt + 1
    assert not [*pipeline._end(Outcome(pools.decode, 0, item, (("a clip", 0),), "frames"))]
    assert work.pieces == []
    pipeline._give_calls()
    assert pools.encode.calls == 0
    assert pools.decode.given[0].pop() == (work, attempt + 1)
