"""The processes that do the work of a preparation: what they are asked to do, whichever way runs them."""

import dataclasses
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from wan_data.prepare.probing.pool import KnownSource
from wan_data.prepare.probing.source_probe import Probed
from wan_data.prepare.report import Report
from wan_data.prepare.results import FinishedShard
from wan_data.prepare.shard_batches import ShardPlan
from wan_data.prepare.shard_writing import ShardFolder
from wan_data.sources.source import SourceFile

ProbedSources = Generator[tuple[SourceFile, Probed], None, None]
WrittenShards = Generator[tuple[ShardPlan, FinishedShard], None, None]


@dataclasses.dataclass(frozen=True)
class Work:
    """What every worker of a preparation knows.

    Attributes:
        model: folder in diffusers' layout, or a hub id.
        folder: of the dataset, with the settings.
        report: receives the progress, in the order of the sources and of the shards.
        local_copies: bytes of the local copies of clips that are in a store; see ``LocalCopies``.
    """

    model: str
    folder: ShardFolder
    report: Report
    local_copies: int | None = None


class Workers(Protocol):
    """The workers of a preparation; the results depend neither on their number nor on where they run."""

    def warm_up(self) -> None:
        """Begin to start what ``write_shards`` needs, while the caller does something else."""

    def probe(self, sources: Iterable[KnownSource]) -> ProbedSources:
        """Probe sources as ``SourceProbe`` does; yield each with its result, in their order."""

    def write_shards(self, plans: Iterable[ShardPlan], samples: int) -> WrittenShards:
        """Encode and write shards.

        Args:
            plans: of the shards; read while they are written.
            samples: number of samples to be encoded, at most.

        Yields:
            Each plan with the record of the shard, which lies complete in the folder.
        """

    def empty_caption(self) -> Float[Tensor, "L D"]:
        """The embedding of the empty caption, fp32 on the CPU."""


StartWorkers = Callable[[Work], AbstractContextManager[Workers]]
