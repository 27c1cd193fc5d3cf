"""What forked writers of a checkpoint say."""

import contextlib
import os
import queue

import pytest

from wan_train.engine.write_results import WriteResults


def test_what_forked_writers_say_is_there_at_once_and_in_order() -> None:
    with contextlib.closing(WriteResults()) as results:
        with pytest.raises(queue.Empty):
            results.get_nowait()
        results.put({0: ["here"]})  # a save without forks
        large = b"x" * 3_000_000  # more than a pipe holds
        for number in range(2):
            if (pid := os.fork()) == 0:
                results.put((number, large))
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
        assert results.get_nowait() == {0: ["here"]}
        assert [results.get_nowait() for _ in range(2)] == [(0, large), (1, large)]
        with pytest.raises(queue.Empty):
            results.get_nowait()
        results.put(OSError(28, "No space left on device"))
        assert results.get_nowait().errno == 28
