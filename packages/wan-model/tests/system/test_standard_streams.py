"""Output that nobody reads, and output on a full disk: what the shell sees of a command."""

import os
import subprocess
import sys
import tempfile
from typing import IO, Any

import pytest

from wan_model.system.standard_streams import system_error_message

# Behind a result there is still work to do, whose end is the exit status 7.
COMMAND = """
import sys
from wan_model.system.standard_streams import checked_streams
with checked_streams(run=sys.argv[1:] == ["run"]):
    print("progress", file=sys.stderr)
    print("result")
    sys.stdout.flush()
    print("more")
    sys.exit(7)
"""
NO_SPACE = "cannot read or write standard output: No space left on device"


def closed_pipe() -> IO[bytes]:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "wb")


def run(out: Any, err: Any = subprocess.PIPE, *arguments: str, code: str = COMMAND) -> tuple[int, list[str]]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], stdout=out, stderr=err, env=environment, text=True, check=False
    )
    return done.returncode, (done.stderr or "").splitlines()


@pytest.mark.parametrize(
    "code", [COMMAND, COMMAND.replace("    sys.stdout.flush()\n", "")], ids=["flushed", "at the end"]
)
def test_a_command_whose_result_nobody_reads_ends_without_a_word(code: str) -> None:
    with closed_pipe() as pipe:
        assert run(pipe, code=code) == (1, ["progress"])


@pytest.mark.parametrize(
    "code", [COMMAND, COMMAND.replace("    sys.stdout.flush()\n", "")], ids=["flushed", "at the end"]
)
def test_a_command_whose_result_has_no_space_says_so(code: str) -> None:
    with open("/dev/full", "w") as full:
        assert run(full, code=code) == (1, ["progress", f"Error: {NO_SPACE}"])


def test_a_run_goes_on_without_readers_and_not_without_space() -> None:
    with closed_pipe() as pipe:
        assert run(pipe, subprocess.PIPE, "run") == (7, ["progress"])
        assert run(pipe, pipe, "run") == (7, [])
    with open("/dev/full", "w") as full:
        code, errors = run(full, subprocess.PIPE, "run")
    assert code == 1
    assert errors[-1] == "OSError: [Errno 28] No space left on device: 'standard output'"


def test_progress_that_cannot_be_written_is_dropped() -> None:
    with closed_pipe() as pipe, open("/dev/full", "w") as full:
        for err in (pipe, full):
            assert run(subprocess.DEVNULL, err) == (7, [])


@pytest.mark.parametrize("argument", ["", "run"])
def test_a_character_that_standard_output_cannot_show_is_escaped(
    argument: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    with tempfile.TemporaryFile() as out:
        assert run(out, subprocess.PIPE, argument, code=COMMAND.replace('"result"', r'"r\xe9sult"')) == (
            7,
            ["progress"],
        )
        out.seek(0)
        assert out.read() == b"r\\xe9sult\nmore\n"


def test_a_stream_that_is_closed_from_the_start_is_none() -> None:
    command = [
        "bash",
        "-c",
        'exec "$0" -c "$1" >&- 2>&-',
        sys.executable,
        COMMAND.replace("    sys.stdout.flush()\n", ""),
    ]
    assert subprocess.run(command, check=False).returncode == 7


def test_an_interruption_while_an_object_is_finalised_is_not_lost() -> None:
    code = """
import signal, time
from wan_model.system.standard_streams import checked_streams
signal.signal(signal.SIGINT, signal.default_int_handler)
class Finalised:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
try:
    with checked_streams():
        Finalised()
        time.sleep(60)
except KeyboardInterrupt:
    raise SystemExit(9)
"""
    assert run(subprocess.DEVNULL, code=code) == (9, [])


def test_what_the_system_refuses_is_a_sentence() -> None:
    denied = PermissionError(13, "Permission denied", b"/data/\xc3\xbc")
    assert system_error_message(denied) == "cannot read or write /data/ü: Permission denied"
    no_process = "the system starts no further process or thread; "
    for error in (
        BlockingIOError(11, "Resource temporarily unavailable"),
        RuntimeError("can't start new thread"),
        RuntimeError("Resource temporarily unavailable"),
    ):
        assert (system_error_message(error) or "").startswith(no_process)
    for error in (ConnectionResetError(104, "Connection reset by peer"), RuntimeError("another"), KeyError("x")):
        assert system_error_message(error) is None
    code = "from wan_model.system.standard_streams import checked_streams\nwith checked_streams(): open('/absent/file')"
    said = "Error: cannot read or write /absent/file: No such file or directory"
    assert run(subprocess.DEVNULL, code=code) == (1, [said])
