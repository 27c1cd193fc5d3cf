"""A file of prompts: a line each, or JSON lines with settings of their own. Imports no torch.

In a ``.txt`` file every line that is not empty is a prompt. In a ``.jsonl`` file every line is an object with
``prompt`` and whatever differs from the command line: ``size`` (``"832*480"``), ``frames``, ``seed``,
``negative_prompt``, ``steps``, ``shift``, ``guidance``, ``solver``.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from wan_infer.request.settings import SOLVERS, Settings, VideoRequest, parse_size

_OF_REQUEST = {"prompt": str, "size": str, "frames": int, "seed": int}
_OF_SETTINGS = {"negative_prompt": str, "steps": int, "shift": float, "guidance": float, "solver": str}


@dataclasses.dataclass(frozen=True)
class Shot:
    """One video: what, and how."""

    request: VideoRequest
    settings: Settings


def read_prompt_file(path: Path, request: VideoRequest, settings: Settings) -> list[Shot]:
    """What a file asks for.

    Args:
        path: ends in .txt or .jsonl; UTF-8.
        request: size, frames and seed where a line does not say; its prompt is replaced.
        settings: likewise.

    Raises:
        ValueError: no such file, nothing in it, or a line that cannot be meant, with its number.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"the prompts file {path} must end in .txt (a prompt a line) or .jsonl (an object a line)")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: JSON text may hold U+2028
    except OSError as error:
        raise ValueError(f"the prompts file {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompts file {path} is not UTF-8: {error.reason} at byte {error.start}") from error
    shots = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            if path.suffix == ".txt":
                shots.append(Shot(dataclasses.replace(request, prompt=line.strip()), settings))
            else:
                shots.append(_shot(line, request, settings))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not shots:
        raise ValueError(f"the prompts file {path} holds no prompt")
    return shots


def _shot(line: str, request: VideoRequest, settings: Settings) -> Shot:
    try:
        given = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(given, dict) or "prompt" not in given:
        raise ValueError('expected an object such as {"prompt": "a rabbit", "seed": 1}')
    kinds = {**_OF_REQUEST, **_OF_SETTINGS}
    for name, value in given.items():
        if name not in kinds:
            raise ValueError(f"there is no setting {name!r}; expected some of {', '.join(kinds)}")
        if not _is(value, kinds[name]):
            raise ValueError(f"{name} is {value!r}; expected {kinds[name].__name__}")
    if given.get("solver", SOLVERS[0]) not in SOLVERS:
        raise ValueError(f"there is no solver {given['solver']!r}; expected {', '.join(SOLVERS)}")
    changes: dict[str, Any] = {name: given[name] for name in ("prompt", "frames", "seed") if name in given}
    if "size" in given:
        changes["width"], changes["height"] = parse_size(given["size"])
    own: dict[str, Any] = {name: kind(given[name]) for name, kind in _OF_SETTINGS.items() if name in given}
    return Shot(dataclasses.replace(request, **changes), dataclasses.replace(settings, **own))


def _is(value: object, kind: type) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)
