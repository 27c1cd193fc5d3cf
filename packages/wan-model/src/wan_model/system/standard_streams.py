"""Standard output and standard error of a command, where nobody reads them any more or the disk is full.

| stream | nobody reads it (``command | head -1``) | it cannot be written (a full disk) |
|---|---|---|
| standard error: progress, warnings | dropped; the command goes on | the same |
| standard output of a command: its result | the command ends with exit status 1, without a word | one sentence, 1 |
| standard output of a training run | dropped; the run goes on | an ``OSError`` that names it |

A character that the encoding of a stream has not, such as of a terminal with ASCII, is written as an escape.

Imports no torch.
"""

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wan_model.system.files import naming
from wan_model.system.import_path import safe_import_path
from wan_model.system.terminal import write_text

_OUTPUT = "standard output"
_REPEAT_SECONDS = 0.05
_NO_THREAD = ("can't start new thread", os.strerror(errno.EAGAIN))


def system_error_message(error: BaseException) -> str | None:
    """The sentence for what the system refuses: a file or a stream, or another process or thread; None for the rest."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"cannot read or write {os.fsdecode(error.filename)}: {error.strerror}"
    # Of os.fork; of Python's threads; of those of torch, in C++.
    if isinstance(error, BlockingIOError) or (isinstance(error, RuntimeError) and str(error).endswith(_NO_THREAD)):
        return "the system starts no further process or thread; start fewer processes, or raise the limit (ulimit -u)"
    return None


def is_unread_output(error: BaseException) -> bool:
    """Whether it says that nobody reads standard output any more."""
    return isinstance(error, BrokenPipeError) and error.filename == _OUTPUT


class _Stream:
    """A text stream whose errors name it, and which takes any character.

    Args:
        stream: the stream; all that is not below is its own.
        name: of the stream, in errors.
        drops: the errors that are ignored, with the text.
    """

    def __init__(self, stream: Any, name: str, *drops: type[OSError]) -> None:
        self._stream, self._name, self._drops = stream, Path(name), drops

    def write(self, text: str) -> int:
        with contextlib.suppress(*self._drops), naming(self._name):
            return write_text(self._stream, text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(*self._drops), naming(self._name):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _settle(stream: Any) -> None:
    """Write what is left; where that fails drop it: Python would try again at its end, and complain."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
            stream.flush()


@contextlib.contextmanager
def _interrupts_kept() -> Iterator[None]:
    """Repeat a ``KeyboardInterrupt`` that Python drops, because it was raised while an object was finalised."""
    before, main = sys.unraisablehook, threading.main_thread().ident
    assert main is not None, "it runs"

    def repeat(unraisable: Any) -> None:
        if unraisable.exc_type is not KeyboardInterrupt:
            before(unraisable)
            return
        # Later, because here it would be dropped as well.
        again = threading.Timer(_REPEAT_SECONDS, signal.pthread_kill, (main, signal.SIGINT))
        again.daemon = True
        again.start()

    sys.unraisablehook = repeat
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextlib.contextmanager
def checked_streams(*, run: bool = False) -> Iterator[None]:
    """In this context, that of a whole command, standard output and standard error behave as in the table above.

    An error that leaves the context and has a ``system_error_message`` ends the process with it and exit status 1.
    Processes that the command starts do not import from the working folder (``safe_import_path``), and no interruption
    is lost.

    Args:
        run: whether the work of the command matters more than its output.
    """
    out, err = sys.stdout, sys.stderr
    # A stream that was closed when the process started is None, and print ignores it.
    if out is not None:
        sys.stdout = _Stream(out, _OUTPUT, *([BrokenPipeError] if run else []))
    if err is not None:
        sys.stderr = _Stream(err, "standard error", OSError)
    try:
        try:
            with safe_import_path(), _interrupts_kept():
                yield
        finally:
            if out is not None and not run:  # a run flushes each line, and reports its own errors
                sys.stdout.flush()
    except (OSError, RuntimeError) as error:
        message = None if run else system_error_message(error)
        if message is None:
            raise
        if not is_unread_output(error):
            print(f"Error: {message}", file=sys.stderr)
        sys.exit(1)
    finally:
        sys.stdout, sys.stderr = out, err
        for stream in (out, err):
            if stream is not None:
                _settle(stream)


class CheckedCommand:
    """Base of a click command or group, before click's own: its streams are checked, and Ctrl+C ends it in a sentence.

    A ``KeyboardInterrupt`` that leaves the command is printed with what it says, and the exit status is 130, as of a
    shell. Click would print "Aborted!" and exit with 1.
    """

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """As of any command."""
        with checked_streams():
            return super().main(*args, **kwargs)  # type: ignore[misc]

    def invoke(self, ctx: Any) -> Any:
        """As of any command."""
        try:
            return super().invoke(ctx)  # type: ignore[misc]
        except KeyboardInterrupt as interrupt:
            print(f"Ended by SIGINT. {interrupt}".rstrip(), file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
