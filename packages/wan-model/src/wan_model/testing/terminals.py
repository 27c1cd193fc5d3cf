"""What a program shows on a terminal, for tests of output that is different there."""

import os
import pty
import tty
from collections.abc import Callable
from typing import TextIO


def shown_on_a_terminal(write: Callable[[TextIO], object]) -> str:
    """The characters that ``write`` sends to a pseudo-terminal, 2,000 at most, because a terminal's buffer is small."""
    reader, writer = pty.openpty()
    try:
        tty.setraw(writer)  # a line ends with \n alone
        with open(writer, "w", encoding="utf-8") as stream:
            write(stream)
            stream.write("\0")  # the end, since a read waits for something to read
            stream.flush()
            shown = b""
            while not shown.endswith(b"\0"):
                shown += os.read(reader, 1 << 16)
    finally:
        os.close(reader)
    return shown.decode()[:-1]
