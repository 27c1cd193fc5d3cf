"""A line that is rewritten in place, on a terminal and in a log."""

from pathlib import Path
from typing import TextIO

import pytest

from wan_model.system.terminal import Terminal
from wan_model.testing.terminals import shown_on_a_terminal


def write(stream: TextIO) -> None:
    terminal = Terminal(stream)
    terminal.update_line("step 1")
    terminal.update_line("step 2")
    terminal.print_line("saved")
    terminal.update_line("step 3")
    terminal.close()
    terminal.close()
    terminal.print_line("end")


def test_a_log_has_every_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as stream:
        write(stream)
    assert log.read_text() == "step 1\nstep 2\nsaved\nstep 3\nend\n"


def test_a_terminal_has_the_last_line_of_each_series() -> None:
    # "\r" returns to the start of a line, "\x1b[2K" (erase in line, ECMA-48) empties it.
    assert shown_on_a_terminal(write) == "step 1\r\x1b[2Kstep 2\r\x1b[2Ksaved\nstep 3\nend\n"


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", "step \\xe9 \\u20ac \\udcff"), ("cp1252", "step é € \\udcff"), ("utf-8", "step é € \\udcff")],
)
def test_what_an_encoding_has_not_is_escaped(encoding: str, shown: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w", encoding=encoding) as stream:
        # The last one stands for a byte of a path that is no UTF-8.
        Terminal(stream).update_line("step é € \udcff")
    assert log.read_text(encoding=encoding) == f"{shown}\n"
