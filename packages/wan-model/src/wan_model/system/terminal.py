"""Lines for people, of which the last may be rewritten in place on a terminal."""

from typing import Any, TextIO


def write_text(stream: Any, text: str) -> int:
    """Write text to a text stream, with escapes such as ``\\xe9`` for the characters that its encoding has not.

    Returns:
        What the stream's ``write`` does.
    """
    try:
        return stream.write(text)
    except UnicodeEncodeError:  # raised before anything is written
        return stream.write(text.encode(stream.encoding, "backslashreplace").decode(stream.encoding))


class Terminal:
    """Output for people; elsewhere than on a terminal, such as in a log, every line is a line of its own.

    Args:
        stream: usually standard output or standard error.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._in_place = stream, False

    @property
    def rewrites(self) -> bool:
        """Whether lines are rewritten in place: the stream is a terminal."""
        return self._stream.isatty()

    def print_line(self, line: str) -> None:
        """Print a line, in place of one that ``update_line`` wrote last."""
        self._write(f"{self._clear()}{line}\n")
        self._in_place = False

    def update_line(self, line: str) -> None:
        """Print a line that the next one replaces if the stream is a terminal."""
        if not self.rewrites:
            self.print_line(line)
            return
        self._write(f"{self._clear()}{line}")
        self._in_place = True

    def close(self) -> None:
        """End a line that was written in place, which stays."""
        if self._in_place:
            self._write("\n")
            self._in_place = False

    def _write(self, text: str) -> None:
        write_text(self._stream, text)
        self._stream.flush()

    def _clear(self) -> str:
        return "\r\x1b[2K" if self._in_place else ""
