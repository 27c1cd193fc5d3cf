"""Sampling a checkpoint, and how far the videos show what their captions say."""

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.commands import run_command
from common.json_file import write_json
from small_world.adherence import Request, measure
from small_world.commands import sampled_files
from small_world.scenes import World

Adherences = dict[str, dict[str, Any]]  # by group, the attributes of small_world.adherence.Adherence


def adherence(
    world: World,
    asked: Sequence[Request],
    line: Sequence[str],
    folder: Path,
    *,
    root: Path,
    environment: Mapping[str, str] | None = None,
) -> Adherences:
    """Run a command that samples the requests and measure its videos, unless ``folder`` holds its result.

    Args:
        world: of the requests.
        asked: the requests.
        line: see ``small_world.commands.sample``.
        folder: created if absent; for the result.
        root: where the command runs.
        environment: variables of the command.

    Raises:
        ToolFailure: the command failed.
    """
    kept = folder / "adherence.json"
    command = shlex.join(line)
    if kept.is_file():
        found = json.loads(kept.read_text(encoding="utf-8"))
        if found["command"] == command:
            return found["adherence"]
    folder.mkdir(parents=True, exist_ok=True)
    printed = folder / "samples.json"
    run_command(*line, folder=root, output=printed, errors=folder / "messages.txt", environment=environment)
    table = measure(world, asked, sampled_files(printed, root))
    result = {name: dataclasses.asdict(one) for name, one in table.items()}
    write_json(kept, {"command": command, "adherence": result})
    return result
