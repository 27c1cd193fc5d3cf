"""The workers of a preparation on a Ray cluster."""

import collections
import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from wan_data.prepare.on_ray.actor_pool import ActorPool, Outcome, Waiting, count_loss
from wan_data.prepare.on_ray.actors import Copies, DecodeActor, EncodeActor, ProbeActor, TextActor, WriteActor
from wan_data.prepare.on_ray.layout import Layout, Stage
from wan_data.prepare.on_ray.shard_pipeline import CALLS_OF_ENCODERS, Pools, ShardPipeline
from wan_data.prepare.planned_source import PlannedSource
from wan_data.prepare.probing.cache import Found
from wan_data.prepare.probing.pool import KnownSource
from wan_data.prepare.probing.source_probe import Probed
from wan_data.prepare.shard_batches import ShardPlan
from wan_data.prepare.workers import ProbedSources, Work, WrittenShards
from wan_data.sources.source import SourceFile

# Of a probing actor: one that it works on, and one that lies ready.
_CALLS_OF_PROBES = 2
# Results that wait for those of earlier sources, for each probing actor.
_WAITING_RESULTS = 8


@dataclasses.dataclass(eq=False)
class _Source:
    """A source that is being probed, and its result."""

    source: SourceFile
    known: Found | None
    losses: int = 0
    probed: Probed | None = None


class RayWorkers:
    """See ``Workers``; use it as a context manager.

    Args:
        work: what is to be done.
        layout: the actors of each stage.
    """

    def __init__(self, work: Work, layout: Layout) -> None:
        self._layout, self._report, self._local_copies = layout, work.report, work.local_copies
        self._folder = dataclasses.replace(work.folder, path=work.folder.path.absolute())
        self._settings = work.folder.settings
        path = Path(work.model)
        self._model = str(path.absolute()) if path.is_dir() else work.model
        visible = (path.absolute(),) if path.is_dir() else ()
        # On the CPU the last digits follow from the number of threads: every actor has as many as this process would.
        self._codec = (visible, self._model, self._settings, layout.device, torch.get_num_threads())
        self._text: ActorPool | None = None

    def __enter__(self) -> "RayWorkers":
        """The actors start when they are needed."""
        return self

    def __exit__(self, *error: object) -> None:
        """Kill the actors that are left."""
        if self._text is not None:
            self._text.close()

    def warm_up(self) -> None:
        """Nothing: the processors are those of the probing actors until all sources are probed."""

    def probe(self, sources: Iterable[KnownSource]) -> ProbedSources:
        """See ``Workers``."""
        items = (_Source(source, known) for source, known in sources)
        if (first := next(items, None)) is None:
            return
        stage, waiting = self._layout.probe, Waiting(self._report)
        arguments = (_folders([first.source]), self._settings, self._copies_of(stage))
        with contextlib.closing(ActorPool(stage, ProbeActor, arguments, calls=_CALLS_OF_PROBES)) as pool:
            window, todo, more = collections.deque([first]), collections.deque([first]), True
            while window:
                while more and len(window) < _WAITING_RESULTS * stage.actors:
                    if (item := next(items, None)) is None:
                        more = False
                    else:
                        window.append(item)
                        todo.append(item)
                for member in pool.free():
                    if not todo:
                        break
                    item = todo.popleft()
                    pool.call(member, item, "probe", _with_absolute_path(item.source), item.known)
                if window[0].probed is None:
                    for outcome in waiting.outcomes(pool):
                        self._end_probing(outcome, todo)
                while window and (probed := window[0].probed) is not None:
                    yield window.popleft().source, probed

    def _end_probing(self, outcome: Outcome, todo: collections.deque[_Source]) -> None:
        item: _Source = outcome.item
        if outcome.lost is not None:
            item.losses = count_loss(item.losses, item.source.name, outcome.lost)
            todo.appendleft(item)
            return
        item.probed = probed = outcome.value
        if isinstance(probed.result, PlannedSource) and item.source.path is not None:
            result = dataclasses.replace(probed.result, path=item.source.path)
            item.probed = Probed(result, probed.found)

    def write_shards(self, plans: Iterable[ShardPlan], samples: int) -> WrittenShards:
        """See ``Workers``."""
        layout, plans = self._layout, iter(plans)
        if (first := next(plans, None)) is None:
            return
        visible = _folders(SourceFile(part.source.name, part.source.path) for part in first.parts[:1])
        with contextlib.ExitStack() as stack:
            self._report.log(f"loading {self._model} on the Ray cluster")

            def pool(pool: ActorPool) -> ActorPool:
                return stack.enter_context(contextlib.closing(pool))

            # In this order they get what they take of the nodes.
            encode = pool(ActorPool(layout.encode, EncodeActor, self._codec, calls=CALLS_OF_ENCODERS))
            text = self._texts()
            write = pool(ActorPool(layout.write, WriteActor, ((self._folder.path,), self._folder)))
            of_decoders = visible, self._settings, self._copies_of(layout.decode)
            decode = pool(ActorPool(layout.decode, DecodeActor, of_decoders))
            self._report.stage("encoding", samples)
            pools = Pools(decode, encode, text, write)
            yield from ShardPipeline(_with_first(first, plans), pools, self._settings, self._report).run()

    def _copies_of(self, stage: Stage) -> Copies:
        return Copies(self._local_copies, stage.actors)

    def _texts(self) -> ActorPool:
        if self._text is None:
            self._text = ActorPool(self._layout.text, TextActor, self._codec)
        return self._text

    def empty_caption(self) -> Float[Tensor, "L D"]:
        """See ``Workers``."""
        pool, waiting, losses, asked = self._texts(), Waiting(self._report), 0, False
        while True:
            if not asked and (member := next(pool.free(), None)) is not None:
                pool.call(member, None, "empty_caption")
                asked = True
            for outcome in waiting.outcomes(pool):
                if outcome.lost is None:
                    return torch.from_numpy(outcome.value.copy())
                losses, asked = count_loss(losses, "the empty caption", outcome.lost), False


def _folders(sources: Iterable[SourceFile]) -> tuple[Path, ...]:
    """The folders of the clips, for a node to look for; a clip itself may be gone meanwhile."""
    return tuple(
        {source.path.absolute().parent for source in sources if isinstance(source.path, Path) and source.path.exists()}
    )


def _with_absolute_path(source: SourceFile) -> SourceFile:
    """The source for a node, where the working folder is another one."""
    return dataclasses.replace(source, path=source.path.absolute()) if isinstance(source.path, Path) else source


def _with_first(first: ShardPlan, others: Iterator[ShardPlan]) -> Iterator[ShardPlan]:
    yield first
    yield from others
