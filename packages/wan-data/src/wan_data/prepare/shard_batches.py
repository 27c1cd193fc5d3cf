"""Planning a batch of shards: which windows of which sources go into which shard, before anything is encoded.

The plan is written to a file first. The shards therefore depend neither on the number of processes, nor on their speed,
nor on an interruption. Files that are added later make another batch, with further shard numbers.
"""

import contextlib
import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from wan_data.prepare.probe import PlannedSource, ProbeResult, RejectedSource
from wan_data.prepare.settings import PrepareSettings
from wan_data.prepare.work_files import LARGEST, remedy_named
from wan_data.shards.json_records import from_json
from wan_model.system.files import write_json
from wan_model.system.safe_reading import read_json

BATCH_NAME = "round.json"  # the spelling of the first release
SPLITS = ("train", "val")


@dataclasses.dataclass(frozen=True)
class SourceWindows:
    """A range of the windows of one source, by their numbers."""

    source: PlannedSource
    windows: range


@dataclasses.dataclass(frozen=True)
class ShardPlan:
    """The content of one shard.

    Attributes:
        number: of the shard, counted over all batches.
        split: the split it belongs to.
        parts: windows of its sources, in order.
    """

    number: int
    split: str
    parts: tuple[SourceWindows, ...]

    @property
    def samples(self) -> int:
        """The number of samples."""
        return sum(len(part.windows) for part in self.parts)

    def windows(self) -> Iterator[tuple[PlannedSource, int]]:
        """Source and window number of each sample, in order."""
        return ((part.source, number) for part in self.parts for number in part.windows)


@dataclasses.dataclass(frozen=True)
class ShardBatch:
    """A planned batch of shards: the sources that are encoded together.

    Attributes:
        first_shard: number of its first shard.
        accepted: the sources to encode, each with its split.
        rejected: the sources that cannot be used.
        replaced: names of accepted sources that have samples in the dataset, which the new ones replace.
        removed: names of sources whose samples are removed.
    """

    first_shard: int
    accepted: tuple[tuple[PlannedSource, str], ...]
    rejected: tuple[RejectedSource, ...]
    replaced: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    def shards(self, samples_per_shard: int) -> list[ShardPlan]:
        """The content of each shard, split by split; the last shard of a split may hold fewer samples."""
        plans: list[ShardPlan] = []
        for split in SPLITS:
            windows = ((source, i) for source, of in self.accepted if of == split for i in range(len(source.windows)))
            for windows_of_shard in _chunks(windows, samples_per_shard):
                parts = []
                for _, group in itertools.groupby(windows_of_shard, key=lambda window: window[0].name):
                    (source, first), *others = group
                    parts.append(SourceWindows(source, range(first, first + 1 + len(others))))
                plans.append(ShardPlan(self.first_shard + len(plans), split, tuple(parts)))
        return plans

    def write(self, folder: Path) -> None:
        """Write the plan into the folder of an unfinished preparation."""
        accepted = [{**source.to_dict(), "split": split} for source, split in self.accepted]
        rejected = [dataclasses.asdict(source) for source in self.rejected]
        value = {"first_shard": self.first_shard, "accepted": accepted, "rejected": rejected}
        write_json(folder / BATCH_NAME, {**value, "replaced": self.replaced, "removed": self.removed})

    @classmethod
    def read(cls, folder: Path) -> "ShardBatch | None":
        """The plan in a folder, or None if there is none.

        Raises:
            ValueError: the file is damaged.
        """
        path = folder / BATCH_NAME
        # Without the plan, what has been encoded by it is of no use either.
        with remedy_named(f"remove the folder {folder}"), contextlib.suppress(FileNotFoundError):
            plan = from_json(_Plan, read_json(path, LARGEST), str(path))
            accepted = []
            for number, source in enumerate(plan.accepted):
                split = source.get("split")
                if split not in SPLITS:
                    raise ValueError(f"{path} has a source of no split; expected one of {', '.join(SPLITS)}")
                rest = {name: value for name, value in source.items() if name != "split"}
                accepted.append((from_json(PlannedSource, rest, f"{path}, source {number + 1},"), split))
            return cls(plan.first_shard, tuple(accepted), plan.rejected, plan.replaced, plan.removed)
        return None


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The content of the file; each accepted source is a ``PlannedSource`` with its split."""

    first_shard: int
    accepted: tuple[dict[str, Any], ...]
    rejected: tuple[RejectedSource, ...]
    replaced: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


def _chunks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while chunk := list(itertools.islice(items, size)):
        yield chunk


def plan_shard_batch(
    results: Sequence[ProbeResult], settings: PrepareSettings, *, first_shard: int, known: Mapping[str, str]
) -> ShardBatch:
    """Assign a split to every accepted source.

    The split follows from the source's content and the seed alone. Files that are added later therefore change nothing
    for the existing ones, and files of equal content are in the same split. In the first batch both splits get at least
    one source, if there are two.

    Args:
        results: of probing the sources.
        settings: of the preparation.
        first_shard: number of the batch's first shard.
        known: splits of the contents (by sha256) that earlier batches have encoded; empty in the first batch.
    """
    accepted = [result for result in results if isinstance(result, PlannedSource)]
    draws = {source.sha256: _draw(source.sha256, settings.seed) for source in accepted}
    splits = {
        content: known.get(content) or ("val" if draw < settings.validation_fraction else "train")
        for content, draw in draws.items()
    }
    if not known and len(splits) > 1 and settings.validation_fraction > 0:
        ranked = sorted(draws, key=lambda content: (draws[content], content))
        splits[ranked[0]], splits[ranked[-1]] = "val", "train"
    elif not known and len(splits) == 1:
        splits = dict.fromkeys(splits, "train")
    return ShardBatch(
        first_shard,
        tuple((source, splits[source.sha256]) for source in accepted),
        tuple(result for result in results if isinstance(result, RejectedSource)),
    )


def _draw(content: str, seed: int) -> float:
    """A number that is uniform over [0, 1) for random contents."""
    digest = hashlib.sha256(f"{seed}\n{content}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


# -- encoding tasks ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class EncodeTask:
    """Windows of one shard and one frame size that one process encodes, batched by length.

    Attributes:
        shard: number of the shard.
        parts: in the order of the shard.
    """

    shard: int
    parts: tuple[SourceWindows, ...]


def encode_tasks(plan: ShardPlan, batch_size: int) -> list[EncodeTask]:
    """Divide a shard into tasks that fill an encoder batch wherever there are enough windows of one size."""
    if batch_size == 1:
        return [EncodeTask(plan.number, (part,)) for part in plan.parts]
    open_tasks: dict[Any, list[SourceWindows]] = {}
    tasks: list[EncodeTask] = []
    for part in plan.parts:
        open_parts = open_tasks.setdefault(part.source.size, [])
        open_parts.append(part)
        if sum(len(one.windows) for one in open_parts) >= batch_size:
            tasks.append(EncodeTask(plan.number, tuple(open_tasks.pop(part.source.size))))
    return tasks + [EncodeTask(plan.number, tuple(parts)) for parts in open_tasks.values()]
