"""Actors that several tests use one after another, and what tests do to them."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import ray

from wan_data.prepare.on_ray import ray_workers
from wan_data.prepare.on_ray.actor_pool import ActorPool, Member


class ReusedPool(ActorPool):
    """A pool that takes over the idle actors of an earlier one: starting an actor takes seconds."""

    idle: ClassVar[dict[str, list[Any]]] = {}
    # Called before each call with the pool, the actor and the method.
    watch: ClassVar[Callable[["ReusedPool", Member, str], None] | None] = None

    @property
    def _key(self) -> str:
        return repr((self._actor, self.stage.cpus, self._arguments))

    def _create(self) -> Any:
        idle = self.idle.get(self._key)
        return idle.pop() if idle else super()._create()

    def call(self, member: Member, item: Any, method: str, *arguments: Any, returns: int = 1) -> None:
        if self.watch is not None:
            type(self).watch(self, member, method)  # type: ignore[misc]
        super().call(member, item, method, *arguments, returns=returns)

    def close(self) -> None:
        for member in self.members[:]:
            if member.started and not member.calls:
                self.idle.setdefault(self._key, []).append(member.handle)
                self.members.remove(member)
        super().close()


@contextmanager
def watched(watch: Callable[[ReusedPool, Member, str], None]) -> Iterator[None]:
    """In this context a function sees each call before it is made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReusedPool, "watch", watch)
        yield


@contextmanager
def reused_actors() -> Iterator[None]:
    """In this context preparations of this process share actors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_workers, "ActorPool", ReusedPool)
        yield
    ReusedPool.idle.clear()


def process_of(member: Member) -> int:
    """The process of an actor that is idle."""
    return ray.get(member.handle.__ray_call__.remote(lambda actor: os.getpid()))


def lose_next_call(member: Member) -> Callable[[], None]:
    """Keep an actor from its next call; the returned function kills it."""
    process = process_of(member)
    os.kill(process, signal.SIGSTOP)
    return lambda: os.kill(process, signal.SIGKILL)
