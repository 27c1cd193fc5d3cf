"""The actors of one stage: started, given calls, replaced when they are lost, and killed at the end."""

import collections
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import ray

from wan_data import __version__
from wan_data.prepare.on_ray.actors import StageActor
from wan_data.prepare.on_ray.layout import Stage
from wan_data.prepare.report import Report
from wan_data.storage.failures import UnusableCredentialsError, UnusableStoreError

# A call that is lost so often may be what kills its actors.
MOST_LOSSES = 5
_SECONDS_BEFORE_WAITING_IS_SAID = 30.0
# No limit of time: who encodes a long clip without a GPU may need this long.
SECONDS_BEFORE_A_CALL_IS_SLOW = 600.0
_LONGEST_REASON = 300
_END_SECONDS = 3.0
# Of the actors of each stage: a name is taken while one that was killed is still ending.
_numbers: dict[str, Iterator[int]] = collections.defaultdict(itertools.count)


class Member:
    """One actor.

    Attributes:
        handle: Ray's.
        started: whether it is ready for calls.
        calls: what it is to do, by the reference of the first result.
        since: when it began with what it does now, by ``time.monotonic``; None once it was said that it takes long.
    """

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.started = False
        self.starting = handle.start.remote()
        self.calls: dict[Any, tuple[Any, Any]] = {}
        self.since: float | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The end of a call.

    Attributes:
        pool, member: whose it was.
        item: that it was about.
        value: its first result.
        data: reference of its second result, which is in the object store.
        lost: why there is no result, because an actor or an object was lost; None if there is.
        actor_lost: the actor was lost, and not only an argument of the call.
    """

    pool: "ActorPool"
    member: Member
    item: Any
    value: Any = None
    data: Any = None
    lost: str | None = None
    actor_lost: bool = False


class ActorPool:
    """The actors of a stage.

    Args:
        stage: its name, the number of its actors and what they take of a node.
        actor: the class.
        arguments: of the class.
        calls: that an actor has at a time; one more than it works on keeps it busy.
    """

    def __init__(self, stage: Stage, actor: type[StageActor], arguments: Sequence[Any], *, calls: int = 1) -> None:
        self.stage, self._actor, self._arguments, self._most_calls = stage, actor, arguments, calls
        self._failed_starts = 0
        self.members: list[Member] = []
        for _ in range(stage.actors):
            self._add()

    @property
    def calls(self) -> int:
        """The number of calls that have no outcome yet."""
        return sum(len(member.calls) for member in self.members)

    @property
    def started(self) -> bool:
        """Whether an actor is ready for calls."""
        return any(member.started for member in self.members)

    def free(self) -> Iterator[Member]:
        """Actors that take another call, the idle ones first; each may be given one before the next is asked for."""
        for calls in range(self._most_calls):
            for member in self.members:
                if member.started and len(member.calls) == calls:
                    yield member

    def call(self, member: Member, item: Any, method: str, *arguments: Any, returns: int = 1) -> None:
        """Call a method of an actor of ``free``.

        Args:
            member: the actor.
            item: of the outcome.
            method: its name.
            arguments: of the method.
            returns: 1, or 2 if the second result is to stay in the object store.
        """
        bound = getattr(member.handle, method).options(name=self.stage.name, num_returns=returns)
        result = bound.remote(*arguments)
        first, second = (result, None) if returns == 1 else result
        if not member.calls:
            member.since = time.monotonic()
        member.calls[first] = item, second

    def references(self) -> list[Any]:
        """What to wait for."""
        return [
            reference
            for member in self.members
            for reference in (*(() if member.started else (member.starting,)), *member.calls)
        ]

    def outcomes(self, references: Sequence[Any]) -> Iterator[Outcome]:
        """The outcomes of those calls among the references that are of this pool and have ended.

        Raises:
            ValueError, OSError: what an actor has raised.
            ChildProcessError: actors are lost again and again while they start.
        """
        ready = {*references}
        for member in [*self.members]:
            if member.starting in ready and not member.started:
                yield from self._end_start(member)
            for reference in [one for one in member.calls if one in ready]:
                if reference in member.calls:  # not lost with an earlier one
                    yield from self._end_call(member, reference)

    def _end_start(self, member: Member) -> Iterator[Outcome]:
        value, reason, _ = _result(member.starting)
        if reason is not None:
            self._failed_starts += 1
            if self._failed_starts > MOST_LOSSES:
                raise ChildProcessError(
                    f"{self._failed_starts} actors of {self.stage.name} were lost one after another while they "
                    f"started, the last because {reason}; run the same command again to resume"
                )
            yield from self._replace(member, reason)
            return
        node, version = value
        if version != __version__:
            raise ValueError(
                f"the node {node} of the Ray cluster has wan-data {version}, and this command is of {__version__}; "
                "install one version on all nodes"
            )
        self._failed_starts, member.started = 0, True

    def _end_call(self, member: Member, reference: Any) -> Iterator[Outcome]:
        value, reason, actor_lost = _result(reference)
        if actor_lost:
            yield from self._replace(member, str(reason))
            return
        item, data = member.calls.pop(reference)
        member.since = time.monotonic()
        yield Outcome(self, member, item, value, data, reason)

    def _replace(self, member: Member, reason: str) -> Iterator[Outcome]:
        calls = [*member.calls.values()]
        member.calls.clear()
        self.members.remove(member)
        _kill(member)
        self._add()
        for item, _ in calls:
            yield Outcome(self, member, item, lost=reason, actor_lost=True)

    def _add(self) -> None:
        self.members.append(Member(self._create()))

    def _create(self) -> Any:
        stage = self.stage
        actor = ray.remote(self._actor).options(
            name=f"{stage.name} {next(_numbers[stage.name])}",
            num_cpus=stage.cpus,
            num_gpus=stage.gpus,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )
        return actor.remote(*self._arguments)

    def close(self) -> None:
        """End the actors, and kill them."""
        if self._actor.end is not StageActor.end:
            with contextlib.suppress(ray.exceptions.RayError):
                ending = [member.handle.end.remote() for member in self.members if member.started]
                if ending:  # one that is busy for longer leaves its files for the next on its node to delete
                    ray.wait(ending, num_returns=len(ending), timeout=_END_SECONDS)
        for member in self.members:
            _kill(member)
        self.members.clear()


def _kill(member: Member) -> None:
    with contextlib.suppress(ray.exceptions.RayError):
        ray.kill(member.handle)


def _result(reference: Any) -> tuple[Any, str | None, bool]:
    """The result of a call; or why it was lost, and whether its actor was."""
    try:
        return ray.get(reference), None, False
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, ray.exceptions.RayError):  # an argument was lost
            return None, _sentence(cause), False
        if isinstance(cause, ValueError | OSError):
            raise _of_node(cause, error.ip) from None
        raise
    except ray.exceptions.RayActorError as error:
        return None, _sentence(error), True
    except ray.exceptions.RayError as error:
        return None, _sentence(error), False


def _of_node(error: ValueError | OSError, node: str) -> ValueError | OSError:
    """The error of an actor; one that is of its node rather than of a clip names the node."""
    where = f"this is on the node {node} of the Ray cluster, whose actors have the environment of its ray start"
    if isinstance(error, UnusableCredentialsError):
        return UnusableCredentialsError(error.errno, f"{error.strerror}; {where}", error.filename)
    if isinstance(error, UnusableStoreError):
        return UnusableStoreError(f"{error}; {where}")
    return error


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return text[:_LONGEST_REASON] + "..." * (len(text) > _LONGEST_REASON)


class Waiting:
    """Waits for the calls of several pools.

    Args:
        report: is told of what is lost, and of stages that have no actor for long because the cluster has no room.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self._said: set[str] = set()

    def outcomes(self, *pools: ActorPool) -> Iterator[Outcome]:
        """Wait until at least one call has ended or an actor is ready; yields the outcomes."""
        references = [reference for pool in pools for reference in pool.references()]
        self._say_slow(pools)
        ready, _ = ray.wait(references, timeout=_SECONDS_BEFORE_WAITING_IS_SAID)
        if not ready:
            self._say_missing(pools)
            return
        ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
        for pool in pools:
            for outcome in pool.outcomes(ready):
                if outcome.lost is not None:
                    self._report.log(f"{pool.stage.name}: lost with its actor or node, done again ({outcome.lost})")
                yield outcome

    def _say_slow(self, pools: Sequence[ActorPool]) -> None:
        before = time.monotonic() - SECONDS_BEFORE_A_CALL_IS_SLOW
        minutes = SECONDS_BEFORE_A_CALL_IS_SLOW / 60
        for pool in pools:
            for member in pool.members:
                if member.calls and member.since is not None and member.since < before:
                    member.since = None
                    self._report.log(
                        f"{pool.stage.name}: an actor has not answered for {minutes:.0f} minutes; if it hangs, kill "
                        "its process, and what it does is done again"
                    )

    def _say_missing(self, pools: Sequence[ActorPool]) -> None:
        for stage in (pool.stage for pool in pools if not pool.started):
            if stage.name not in self._said:
                self._said.add(stage.name)
                self._report.log(
                    f"waiting for the Ray cluster to start {stage.name}: {stage.actors} actors of {stage.cpus:g} CPUs "
                    f"and {stage.gpus:g} GPUs each"
                )


def count_loss(losses: int, what: str, reason: str) -> int:
    """One loss more of what is to be done.

    Raises:
        ChildProcessError: it was lost too often.
    """
    if losses >= MOST_LOSSES:
        raise ChildProcessError(
            f"{what} was given to {losses + 1} actors of the Ray cluster, which were all lost, the last because "
            f"{reason}; run the same command again to resume"
        )
    return losses + 1
