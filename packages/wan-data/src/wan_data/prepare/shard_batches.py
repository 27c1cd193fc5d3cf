"""What one round of encoding will write: which window goes into which shard, before anything is encoded.

A round is fixed in a file first. So shards depend on nothing that happens while they are written: not on the number of
processes, not on their speed, not on an interruption. Files that are added later make another round with further
shards.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from wan_data.prepare.probe import PlannedSource, RejectedSource, Verdict
from wan_data.prepare.settings import PrepareSettings
from wan_model.system.files import write_json

ROUND_NAME = "round.json"
SPLITS = ("train", "val")


@dataclasses.dataclass(frozen=True)
class Part:
    """Some windows of one source, by their numbers."""

    source: PlannedSource
    windows: range


@dataclasses.dataclass(frozen=True)
class ShardPlan:
    """A shard to be written.

    Attributes:
        number: of the shard, counted over all rounds.
        split: its split.
        parts: what it holds, in order.
    """

    number: int
    split: str
    parts: tuple[Part, ...]

    @property
    def samples(self) -> int:
        """How many it will hold."""
        return sum(len(part.windows) for part in self.parts)

    def windows(self) -> Iterator[tuple[PlannedSource, int]]:
        """Source and number of each window, in order."""
        return ((part.source, number) for part in self.parts for number in part.windows)


@dataclasses.dataclass(frozen=True)
class Round:
    """Sources that are encoded together.

    Attributes:
        first_shard: number of the first shard.
        accepted: with the split of each.
        rejected: the others.
    """

    first_shard: int
    accepted: tuple[tuple[PlannedSource, str], ...]
    rejected: tuple[RejectedSource, ...]

    def shards(self, samples_per_shard: int) -> list[ShardPlan]:
        """The shards, split by split; the last one of a split may be smaller."""
        plans: list[ShardPlan] = []
        for split in SPLITS:
            windows = ((source, i) for source, of in self.accepted if of == split for i in range(len(source.windows)))
            for batch in _batched(windows, samples_per_shard):
                parts = []
                for _, group in itertools.groupby(batch, key=lambda window: window[0].name):
                    members = list(group)
                    parts.append(Part(members[0][0], range(members[0][1], members[-1][1] + 1)))
                plans.append(ShardPlan(self.first_shard + len(plans), split, tuple(parts)))
        return plans

    def write(self, folder: Path) -> None:
        """Fix it in a file."""
        accepted = [{**source.to_dict(), "split": split} for source, split in self.accepted]
        rejected = [dataclasses.asdict(source) for source in self.rejected]
        write_json(folder / ROUND_NAME, {"first_shard": self.first_shard, "accepted": accepted, "rejected": rejected})

    @classmethod
    def read(cls, folder: Path) -> "Round | None":
        """The round that is fixed in a folder, if there is one.

        Raises:
            ValueError: the file is damaged.
        """
        path = folder / ROUND_NAME
        if not path.is_file():
            return None
        try:
            value = json.loads(path.read_bytes())
            return cls(
                int(value["first_shard"]),
                tuple(
                    (PlannedSource.from_dict(_without(source, "split")), source["split"])
                    for source in value["accepted"]
                ),
                tuple(RejectedSource(**source) for source in value["rejected"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); pass --overwrite to begin anew") from None


def _without(value: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: item for name, item in value.items() if name != key}


def _batched(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(itertools.islice(items, size)):
        yield batch


def make_round(
    verdicts: Sequence[Verdict], settings: PrepareSettings, *, first_shard: int, known: Mapping[str, str]
) -> Round:
    """Give every accepted source its split.

    A source's split follows from its content and the seed: it is the same whatever lies beside it, so that files which
    are added later change nothing of those that are there, and files of equal content never stand on both sides. In
    the first round both splits get at least one source where there are two.

    Args:
        verdicts: of the examination.
        settings: of the preparation.
        first_shard: number of the round's first shard.
        known: splits of the contents (by sha256) that earlier rounds have encoded; empty in the first.
    """
    accepted = [verdict for verdict in verdicts if isinstance(verdict, PlannedSource)]
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
    return Round(
        first_shard,
        tuple((source, splits[source.sha256]) for source in accepted),
        tuple(verdict for verdict in verdicts if isinstance(verdict, RejectedSource)),
    )


def _draw(content: str, seed: int) -> float:
    """Evenly spread over [0, 1)."""
    digest = hashlib.sha256(f"{seed}\n{content}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


# -- batches ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Task:
    """Parts of one shard that one process encodes, all of one size; their windows are batched by length.

    Attributes:
        shard: number of the shard.
        parts: in the shard's order.
    """

    shard: int
    parts: tuple[Part, ...]


def tasks_of(plan: ShardPlan, batch_size: int) -> list[Task]:
    """The shard in pieces that fill a batch where there are enough windows of a size."""
    if batch_size == 1:
        return [Task(plan.number, (part,)) for part in plan.parts]
    open_tasks: dict[Any, list[Part]] = {}
    tasks: list[Task] = []
    for part in plan.parts:
        waiting = open_tasks.setdefault(part.source.size, [])
        waiting.append(part)
        if sum(len(one.windows) for one in waiting) >= batch_size:
            tasks.append(Task(plan.number, tuple(open_tasks.pop(part.source.size))))
    return tasks + [Task(plan.number, tuple(parts)) for parts in open_tasks.values()]
