"""Writing one shard from its encoded windows: the last step of encoding, wherever it is done."""

import collections
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import Tensor

from wan_data.index.lengths import LengthCounts
from wan_data.prepare.encoding.encoder import EncodedWindow, make_sample
from wan_data.prepare.planned_source import PlannedSource
from wan_data.prepare.results import FinishedShard
from wan_data.prepare.settings import PrepareSettings
from wan_data.prepare.shard_batches import ShardPlan
from wan_data.shards.writer import ShardWriter


@dataclasses.dataclass(frozen=True)
class ShardFolder:
    """Where shards are written to, and what their samples state.

    Attributes:
        path: folder of the dataset.
        settings: of the preparation.
        fingerprint: of the latent space.
    """

    path: Path
    settings: PrepareSettings
    fingerprint: str


def write_shard(
    folder: ShardFolder,
    plan: ShardPlan,
    windows: Iterator[EncodedWindow],
    embedding_of: Callable[[str], tuple[Tensor, int]],
    step: Callable[[str], None],
) -> FinishedShard:
    """Write a shard.

    Args:
        folder: of the dataset.
        plan: the content of the shard.
        windows: all its windows, in the order in which they were encoded.
        embedding_of: gives the embedding of a caption, and the tokens of the whole caption.
        step: is called with a line for each window.

    Returns:
        The record of the shard, for the next steps.
    """
    done: dict[tuple[str, int], EncodedWindow] = {}
    samples: collections.Counter[str] = collections.Counter()
    shapes: collections.Counter[tuple[int, int, int, tuple[int, ...]]] = collections.Counter()
    dropped: list[tuple[str, int, str]] = []
    cut: dict[str, int] = {}
    lengths: list[tuple[int, int] | None] = []
    with ShardWriter(folder.path, plan.number, plan.split) as shard:
        for source, number in plan.windows():
            while (source.name, number) not in done:
                one = next(windows)
                done[one.source, one.window] = one
            one = done.pop((source.name, number))
            window, size = source.windows[number], source.size
            if one.latent is None:
                dropped.append((source.name, number, str(one.problem)))
                step(describe_window(source, number, one.problem))
                continue
            embedding, tokens = embedding_of(source.caption)
            if tokens > folder.settings.text_length:
                cut[source.name] = tokens
            shard.write(make_sample(source, number, one.latent, embedding, folder.settings, folder.fingerprint))
            samples[source.name] += 1
            lengths.append((embedding.shape[0], len(source.caption)))
            shapes[window.length, size.height, size.width, tuple(one.latent.shape)] += 1
            step(describe_window(source, number, None))
    assert next(windows, None) is None, "every window of the shard was written or dropped"
    counts = tuple((*shape, count) for shape, count in sorted(shapes.items()))
    return FinishedShard(shard.record, dict(samples), counts, tuple(dropped), cut, LengthCounts.of_samples(lengths))


def describe_window(source: PlannedSource, number: int, problem: str | None) -> str:
    """A window in a line, with the reason if it could not be encoded."""
    if problem is not None:
        return f"REJECTED {source.name} window {number + 1}: {problem}"
    length = source.windows[number].length
    return f"{source.name} window {number + 1} of {len(source.windows)}: {length}x{source.size}"
