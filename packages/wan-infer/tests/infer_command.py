"""The command in this process, for tests."""

from click.testing import CliRunner, Result

from wan_infer.cli import main

QUICK = ("--sizes", "32*48", "--frame_nums", "5", "--sample_steps", "2", "--device", "cpu")


def run(*arguments: object) -> Result:
    """The command's result; an exception that is no exit fails the test."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(*arguments: object) -> str:
    """What a failing command says; one line after the progress, and an exit code that is not zero."""
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.startswith(("load", "video "))]
    assert len(lines) == 1
    assert lines[0].startswith("Error: ")
    return lines[0]
