"""The command in this process, for tests."""

from click.testing import CliRunner, Result

from wan_data.cli import main


def run(*arguments: object) -> Result:
    """The command's result; an exception that is no exit fails the test."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result
