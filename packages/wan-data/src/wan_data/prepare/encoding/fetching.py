"""The clips of tasks that are in a store, as local files: fetched ahead, and held while they are decoded."""

import dataclasses
from collections.abc import Iterator, Sequence

from wan_data.prepare.shard_batches import EncodeTask, SourceWindows
from wan_data.sources.contents import object_of
from wan_data.storage.failures import is_of_the_object
from wan_data.storage.local_copies import Held, LocalCopies
from wan_data.storage.store import StoredObject

# Tasks whose clips are on their way before they are decoded.
_AHEAD = 16


def fetched_ahead(tasks: Sequence[EncodeTask], copies: LocalCopies) -> Iterator[EncodeTask]:
    """The tasks, while the clips of the next ones are downloaded as far as there is room."""
    for number, task in enumerate(tasks):
        for later in tasks[number : number + _AHEAD]:
            for found in _objects(later):
                if found is not None:
                    copies.ahead(found)
        yield task


class TaskFetcher:
    """Fetches the clips of tasks; threads may use it.

    Args:
        copies: the local copies.
    """

    def __init__(self, copies: LocalCopies) -> None:
        self._copies = copies
        self._held: dict[int, Held] = {}

    def begin(self, task: EncodeTask, *, wait: bool = True) -> EncodeTask | None:
        """The task with the local files of its clips, which stay until ``end``.

        Who has one task that has not ended, and waits for another, may wait for ever.

        Args:
            task: the task.
            wait: for its clips; otherwise None is returned if they are not there yet.

        Raises:
            OSError: the store fails, or the local disk is full.
        """
        objects = _objects(task)
        if not any(objects):
            return task
        held = self._copies.hold([found for found in objects if found is not None], wait=wait)
        if held is None:
            return None
        try:
            if not wait and not held.done():
                held.release()
                return None
            pairs = zip(task.parts, objects, strict=True)
            fetched = dataclasses.replace(task, parts=tuple(_with_file(*pair, held) for pair in pairs))
        except BaseException:
            held.release()
            raise
        self._held[id(fetched)] = held
        return fetched

    def end(self, task: EncodeTask) -> None:
        """Let go of the clips of a task that ``begin`` has returned."""
        if (held := self._held.pop(id(task), None)) is not None:
            held.release()

    def stop(self) -> None:
        """Let no thread wait for a clip any more."""
        self._copies.stop()


def _objects(task: EncodeTask) -> list[StoredObject | None]:
    return [object_of(part.source.path, part.source.bytes, part.source.mtime_ns) for part in task.parts]


def _with_file(part: SourceWindows, found: StoredObject | None, held: Held) -> SourceWindows:
    if found is None:
        return part
    try:
        return dataclasses.replace(part, file=held.file(found))
    except OSError as error:
        if not is_of_the_object(error):
            raise
        problem = f"it cannot be read: {error.strerror or error}, although it could be before"
        return dataclasses.replace(part, problem=problem)
