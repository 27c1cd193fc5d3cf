"""Shards on a Ray cluster: decoding, encoding, texts and writing at the same time, with a bound on what is under way.

Frames and latents stay in the object store and travel from actor to actor; this process sees their references. Two
numbers bound the memory: of batches of frames (one for each decoding and two for each encoding actor), and of shards
whose latents are not yet written.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from wan_data.prepare.encoding.task_decoder import Problems, WindowKey
from wan_data.prepare.on_ray.actor_pool import ActorPool, Member, Outcome, Waiting, count_loss
from wan_data.prepare.on_ray.actors import LostPieces
from wan_data.prepare.report import Report
from wan_data.prepare.settings import PrepareSettings
from wan_data.prepare.shard_batches import EncodeTask, ShardPlan, encode_tasks
from wan_data.prepare.shard_writing import describe_window
from wan_data.prepare.workers import WrittenShards

# One that an encoding actor works on, and one that lies ready.
CALLS_OF_ENCODERS = 2


@dataclasses.dataclass(frozen=True)
class Pools:
    """The actors of the stages."""

    decode: ActorPool
    encode: ActorPool
    text: ActorPool
    write: ActorPool


@dataclasses.dataclass(eq=False)
class _Piece:
    """A batch of a task.

    Attributes:
        work, attempt: the task, and the attempt at it that this is of.
        keys: of its windows.
        frames, latents: references of the frames, and then of the latents.
        problems: why windows have no latent.
    """

    work: "_Work"
    attempt: int
    keys: tuple[WindowKey, ...]
    frames: Any
    latents: Any = None
    problems: Problems = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(eq=False)
class _Work:
    """A task.

    Attributes:
        task: with absolute paths.
        shard: that it is of.
        attempt: counts how often it was begun.
        losses: of actors and objects that it needed.
        pieces: its batches.
        problems: why windows cannot be used; None until it is decoded to its end.
    """

    task: EncodeTask
    shard: "_Shard"
    attempt: int = 0
    losses: int = 0
    pieces: list[_Piece] = dataclasses.field(default_factory=list)
    problems: Problems | None = None

    @property
    def complete(self) -> bool:
        return self.problems is not None and all(piece.latents is not None for piece in self.pieces)

    def all_problems(self) -> dict[WindowKey, str]:
        assert self.problems is not None, "it is complete"
        return {**self.problems, **{key: text for piece in self.pieces for key, text in piece.problems.items()}}

    def __str__(self) -> str:
        return self.task.parts[0].source.name


@dataclasses.dataclass(eq=False)
class _Shard:
    """A shard that is not yet written.

    Attributes:
        plan: of the shard.
        captions: each once.
        works: its tasks.
        texts: reference of the embeddings.
        asked: the embeddings, or the writing, are being waited for.
        losses: of actors that encoded its captions or wrote it.
    """

    plan: ShardPlan
    captions: tuple[str, ...]
    works: list[_Work] = dataclasses.field(default_factory=list)
    texts: Any = None
    asked: bool = False
    losses: int = 0

    @property
    def complete(self) -> bool:
        return self.texts is not None and all(work.complete for work in self.works)

    def pieces(self) -> list[_Piece]:
        return [piece for work in self.works for piece in work.pieces]

    def __str__(self) -> str:
        return f"shard {self.plan.number}"


class _Progress:
    """Says what has become of the windows, in the order of the shards, whatever is ready first."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._unsaid: collections.deque[Any] = collections.deque()
        self._known: dict[tuple[int, WindowKey], str | None] = {}

    def add(self, plan: ShardPlan) -> None:
        """A further shard."""
        self._unsaid.extend((plan.number, source, number) for source, number in plan.windows())

    def complete(self, work: _Work) -> None:
        """What has become of a task."""
        problems, shard = work.all_problems(), work.shard.plan.number
        for part in work.task.parts:
            for number in part.windows:
                key = part.source.name, number
                self._known[shard, key] = problems.get(key)
        while self._unsaid:
            shard, source, number = self._unsaid[0]
            key = source.name, number
            if (shard, key) not in self._known:
                return
            self._report.step(describe_window(source, number, self._known.pop((shard, key))))
            self._unsaid.popleft()


class ShardPipeline:
    """Encodes and writes shards.

    Args:
        plans: of the shards; read as there is room for them.
        pools: the actors.
        settings: of the preparation.
        report: receives the progress.
    """

    def __init__(self, plans: Iterable[ShardPlan], pools: Pools, settings: PrepareSettings, report: Report) -> None:
        self._plans, self._pools, self._settings = iter(plans), pools, settings
        self._waiting_for, self._progress = Waiting(report), _Progress(report)
        self._more = True
        self._shards: list[_Shard] = []
        self._todo: collections.deque[_Work] = collections.deque()
        self._decoding: dict[Member, _Work] = {}
        self._decoded: collections.deque[_Piece] = collections.deque()
        encoders, decoders = pools.encode.stage.actors, pools.decode.stage.actors
        self._most_frames = decoders + CALLS_OF_ENCODERS * encoders
        being_made = math.ceil(self._most_frames * settings.batch_size / settings.samples_per_shard)
        self._most_shards = pools.write.stage.actors + 1 + being_made

    def run(self) -> WrittenShards:
        """Yield each plan with the record of its shard when it is written, in any order.

        Raises:
            ValueError, OSError: what an actor has raised.
            ChildProcessError: the same was lost with its actor again and again.
        """
        pools = self._pools
        while self._open_shards():
            self._give_calls()
            for outcome in self._waiting_for.outcomes(pools.encode, pools.decode, pools.text, pools.write):
                yield from self._end(outcome)

    def _open_shards(self) -> bool:
        """Take up further shards if there is room; whether there is anything to do."""
        while self._more and len(self._shards) < self._most_shards:
            if (plan := next(self._plans, None)) is None:
                self._more = False
                break
            shard = _Shard(plan, tuple(dict.fromkeys(part.source.caption for part in plan.parts)))
            shard.works = [
                _Work(_with_absolute_paths(task), shard) for task in encode_tasks(plan, self._settings.batch_size)
            ]
            self._shards.append(shard)
            self._todo.extend(shard.works)
            self._progress.add(plan)
        return bool(self._shards)

    def _give_calls(self) -> None:
        pools = self._pools
        for member in pools.encode.free():
            if not self._decoded:
                break
            piece = self._decoded.popleft()
            pools.encode.call(member, piece, "encode", piece.keys, piece.frames, returns=2)
        for member in pools.decode.free():
            if pools.decode.calls + len(self._decoded) + pools.encode.calls >= self._most_frames:
                break
            task = None
            if (work := self._decoding.get(member)) is None:
                if not self._todo:
                    continue
                work = self._decoding[member] = self._todo.popleft()
                task = work.task
            pools.decode.call(member, (work, work.attempt), "decode", task, returns=2)
        self._give_shards(pools.text, [one for one in self._shards if one.texts is None and not one.asked])
        self._give_shards(pools.write, [one for one in self._shards if one.complete and not one.asked])

    def _give_shards(self, pool: ActorPool, shards: list[_Shard]) -> None:
        for shard, member in zip(shards, pool.free(), strict=False):
            shard.asked = True
            if pool is self._pools.text:
                pool.call(member, shard, "encode", shard.captions, returns=2)
                continue
            problems = {key: text for work in shard.works for key, text in work.all_problems().items()}
            pieces = [(piece.keys, piece.latents) for piece in shard.pieces()]
            pool.call(member, shard, "write", shard.plan, shard.captions, [shard.texts], pieces, problems)

    def _end(self, outcome: Outcome) -> WrittenShards:
        pools = self._pools
        if outcome.pool is pools.decode:
            self._end_decoding(outcome)
        elif outcome.pool is pools.encode:
            self._end_encoding(outcome)
        elif outcome.pool is pools.text:
            self._end_text(outcome)
        else:
            yield from self._end_writing(outcome)

    def _end_decoding(self, outcome: Outcome) -> None:
        work, attempt = outcome.item
        if attempt != work.attempt:
            return
        if outcome.lost is not None:
            self._begin_again(work, outcome.lost)
        elif isinstance(outcome.value, tuple):
            piece = _Piece(work, attempt, outcome.value, outcome.data)
            work.pieces.append(piece)
            self._decoded.append(piece)
        else:
            work.problems = outcome.value
            del self._decoding[outcome.member]
            self._end_work(work)

    def _end_encoding(self, outcome: Outcome) -> None:
        piece, work = outcome.item, outcome.item.work
        if piece.attempt != work.attempt:
            return
        if outcome.actor_lost:  # the frames are still there
            work.losses = count_loss(work.losses, str(work), str(outcome.lost))
            self._decoded.appendleft(piece)
        elif outcome.lost is not None:
            self._begin_again(work, outcome.lost)
        else:
            piece.frames, piece.latents = None, outcome.data
            piece.problems = {key: text for key, text in zip(piece.keys, outcome.value, strict=True) if text}
            self._end_work(work)

    def _end_work(self, work: _Work) -> None:
        if work.complete:
            self._progress.complete(work)

    def _end_text(self, outcome: Outcome) -> None:
        shard = outcome.item
        shard.asked = False
        if outcome.lost is not None:
            shard.losses = count_loss(shard.losses, f"the captions of {shard}", outcome.lost)
        else:
            shard.texts = outcome.data

    def _end_writing(self, outcome: Outcome) -> WrittenShards:
        shard = outcome.item
        shard.asked = False
        if outcome.lost is not None:
            shard.losses = count_loss(shard.losses, str(shard), outcome.lost)
            return
        if isinstance(outcome.value, LostPieces):
            pieces = shard.pieces()
            shard.losses = count_loss(shard.losses, str(shard), "a node was lost")
            if -1 in outcome.value.numbers:
                shard.texts = None
            for work in dict.fromkeys(pieces[number].work for number in outcome.value.numbers if number >= 0):
                self._begin_again(work, "a node was lost")
            return
        self._shards.remove(shard)
        yield shard.plan, outcome.value

    def _begin_again(self, work: _Work, reason: str) -> None:
        work.losses = count_loss(work.losses, str(work), reason)
        work.attempt += 1
        work.pieces, work.problems = [], None
        self._decoded = collections.deque(piece for piece in self._decoded if piece.work is not work)
        self._decoding = {member: other for member, other in self._decoding.items() if other is not work}
        self._todo.appendleft(work)


def _with_absolute_paths(task: EncodeTask) -> EncodeTask:
    """The task for a node, where the working folder is another one."""

    def parts() -> Iterator[Any]:
        for part in task.parts:
            if isinstance(path := part.source.path, Path):
                part = dataclasses.replace(part, source=dataclasses.replace(part.source, path=path.absolute()))
            yield part

    return EncodeTask(task.shard, tuple(parts()))
