"""Functions that a process with the engine imported is asked to call, see ``warm_ranks.Call``."""

import json
import sys
from pathlib import Path
from typing import Any


def command_lines(results: str, wanted: dict[str, list[str]]) -> None:
    """``wan-train`` with each list of arguments; by key the exit status, the output and the errors."""
    from click.testing import CliRunner

    from wan_train.cli import main

    found = {}
    for key, arguments in wanted.items():
        result = CliRunner().invoke(main, arguments)
        found[key] = [result.exit_code, result.stdout, result.stderr]
    Path(results).write_text(json.dumps(found))


def note_commands(path: str) -> None:
    """Write down every command that this process runs by ``os.system``."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.system":
            with open(path, "a", encoding="utf-8") as file:
                file.write(repr(arguments))

    sys.addaudithook(hook)
