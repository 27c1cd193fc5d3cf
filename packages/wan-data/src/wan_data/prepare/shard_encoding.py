"""Encoding the shards of a batch that are missing, and writing them."""

import collections
import itertools
from collections.abc import Iterator, Sequence

from wan_data.index.lengths import LengthCounts
from wan_data.prepare.encoding.encoder import EncodedWindow, TextEmbeddings, choose_device, load_codec, make_sample
from wan_data.prepare.encoding.encoder_pool import EncoderPool
from wan_data.prepare.preparation import Preparation
from wan_data.prepare.results import FinishedShard
from wan_data.prepare.shard_batches import EncodeTask, ShardBatch, ShardPlan, encode_tasks
from wan_data.shards.writer import ShardWriter
from wan_model.codec.latent_codec import LatentCodec


class ShardEncoder:
    """Encodes and writes shards.

    Args:
        preparation: that they are of.
    """

    def __init__(self, preparation: Preparation) -> None:
        self._of = preparation
        self._codec: LatentCodec | None = None

    def load_codec(self) -> LatentCodec:
        """The codec of the model, which is loaded once."""
        if self._codec is None:
            self._of.report.log(f"loading {self._of.model}")
            device = choose_device(self._of.device, self._of.ranks.local_rank)
            self._codec = load_codec(self._of.model, self._of.settings, device, vae=self._of.processes == 1, text=True)
        return self._codec

    def write(self, batch: ShardBatch, missing: Sequence[int], name: str) -> None:
        """Write those shards that no other rank writes, and their records.

        Args:
            batch: the plan.
            missing: numbers of the shards, the same on every rank.
            name: of a shared counter; different for every call.
        """
        of = self._of
        pending: collections.deque[tuple[ShardPlan, int]] = collections.deque()

        def tasks() -> Iterator[EncodeTask]:
            for number in of.ranks.claim(missing, name):
                plan = batch.shard(number)
                of_shard = encode_tasks(plan, of.settings.batch_size)
                pending.append((plan, len(of_shard)))
                yield from of_shard

        with EncoderPool(of.model, of.settings, of.device, of.processes, of.ranks.local_rank) as pool:
            codec = self.load_codec()
            text = TextEmbeddings(codec)
            of.report.stage("encoding", batch.samples(missing))
            encoded = pool.encode(tasks(), codec)
            for first in encoded:
                plan, count = pending.popleft()
                results = itertools.islice(itertools.chain([first], encoded), count)
                self._write_shard(plan, (one for _, windows in results for one in windows), text)

    def _write_shard(self, plan: ShardPlan, windows: Iterator[EncodedWindow], text: TextEmbeddings) -> None:
        of, fingerprint = self._of, self._of.spec.fingerprint
        done: dict[tuple[str, int], EncodedWindow] = {}
        samples: collections.Counter[str] = collections.Counter()
        shapes: collections.Counter[tuple[int, int, int, tuple[int, ...]]] = collections.Counter()
        dropped: list[tuple[str, int, str]] = []
        cut: dict[str, int] = {}
        lengths: list[tuple[int, int] | None] = []
        with ShardWriter(of.output, plan.number, plan.split) as shard:
            for source, number in plan.windows():
                while (source.name, number) not in done:
                    one = next(windows)
                    done[one.source, one.window] = one
                one = done.pop((source.name, number))
                window, size = source.windows[number], source.size
                if one.latent is None:
                    dropped.append((source.name, number, str(one.problem)))
                    of.report.step(f"REJECTED {source.name} window {number + 1}: {one.problem}")
                    continue
                embedding, tokens = text.get(source.caption)
                if tokens > of.settings.text_length:
                    cut[source.name] = tokens
                shard.write(make_sample(source, number, one.latent, embedding, of.settings, fingerprint))
                samples[source.name] += 1
                lengths.append((embedding.shape[0], len(source.caption)))
                shapes[window.length, size.height, size.width, tuple(one.latent.shape)] += 1
                of.report.step(f"{source.name} window {number + 1} of {len(source.windows)}: {window.length}x{size}")
        assert next(windows, None) is None, "every window of the shard was written or dropped"
        counts = tuple((*shape, count) for shape, count in sorted(shapes.items()))
        done_shard = FinishedShard(
            shard.record, dict(samples), counts, tuple(dropped), cut, LengthCounts.of_samples(lengths)
        )
        done_shard.write(of.finished(plan.number))
