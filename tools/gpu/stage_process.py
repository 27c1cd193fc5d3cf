"""``python -m gpu.stage_process``: one stage; its rows go to a file, one JSON object a line, as they are measured.

A line ``{"begin": NAME}`` stands before the row of that name, and ``{"end": true}`` is the last one. The exit status is
``DEVICE_LOST`` if another process has to measure the remaining rows.
"""

import argparse
import functools
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from gpu.context import Context
from gpu.rows import DeviceLostError, Found, measured
from wan_model.system.child_process import follow_parent

DEVICE_LOST = 75


def _write(file: TextIO, event: dict[str, Any]) -> None:
    file.write(json.dumps(event) + "\n")
    file.flush()


def _begin(file: TextIO, name: str) -> None:
    _write(file, {"begin": name})


def _run(function: str, context: Context, file: TextIO) -> int:
    def stage() -> Found:
        module, _, name = function.partition(":")
        for row in getattr(importlib.import_module(module), name)(context):
            _write(file, {"row": row.to_json()})
        return Found("the stage came to its end")

    try:
        whole = measured("the stage itself", stage)
    except DeviceLostError:
        return DEVICE_LOST
    if whole.outcome != "passed":
        _write(file, {"row": whole.to_json()})
    _write(file, {"end": True})
    return 0


def main() -> int:
    """Run a stage."""
    parser = argparse.ArgumentParser()
    parser.add_argument("function")
    parser.add_argument("--device", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    ends_at = time.monotonic() + arguments.seconds
    follow_parent(arguments.parent)
    path = arguments.folder / "rows.jsonl"
    done: set[str] = set()
    if path.exists():
        events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        # What had begun and has no row crashed the process before this one.
        done = {event["begin"] if "begin" in event else event["row"]["name"] for event in events}
    with path.open("a", encoding="utf-8") as file:
        begin = functools.partial(_begin, file)
        context = Context(arguments.device, arguments.folder, ends_at, arguments.quick, frozenset(done), begin)
        return _run(arguments.function, context, file)


if __name__ == "__main__":
    sys.exit(main())
