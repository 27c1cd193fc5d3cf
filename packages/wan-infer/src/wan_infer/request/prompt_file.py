"""A file of prompts: one a line, or JSON lines with settings of their own. Imports no torch.

In a ``.txt`` file every line that is not empty is a prompt. In a ``.jsonl`` file every line is an object with
``prompt`` and the values that differ from the command line's: ``size`` (``"832*480"``), ``frames``, ``seed``,
``negative_prompt``, ``steps``, ``shift``, ``guidance``, ``solver``, and, where LoRA files are not merged,
``lora_scale``: a number for all of them, or a list with one for each.
"""

import dataclasses
from pathlib import Path
from typing import Any

from wan_infer.request.options import scales_of
from wan_infer.request.settings import VideoRequest, parse_size
from wan_model.sampling.settings import SOLVERS
from wan_model.system.safe_reading import parse_json, read_text

_REQUEST_KINDS = {"prompt": str, "size": str, "frames": int, "seed": int}
_SETTINGS_KINDS = {"negative_prompt": str, "steps": int, "shift": float, "guidance": float, "solver": str}
_LORA_SCALE = "lora_scale"
# Of integers of JSON, which have no bound; beyond, they cannot be converted to float, or be a seed.
_LARGEST = 2**64


def read_prompt_file(path: Path, default: VideoRequest) -> list[VideoRequest]:
    """The requests of a file.

    Args:
        path: ends in .txt or .jsonl; UTF-8.
        default: size, frames, seed, settings and scales of LoRA where a line does not give them; its prompt is
            replaced.

    Raises:
        ValueError: no such file, no prompt in it, or an invalid line, with its number.
    """
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"the prompts file {path} must end in .txt (a prompt a line) or .jsonl (an object a line)")
    try:
        lines = read_text(path).split("\n")  # not splitlines: JSON text may hold U+2028
    except FileNotFoundError as error:
        raise ValueError(f"the prompts file {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"the prompts file {error}") from error
    requests = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            if path.suffix == ".txt":
                requests.append(dataclasses.replace(default, prompt=line.strip()))
            else:
                requests.append(_parse_object(line, default))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not requests:
        raise ValueError(f"the prompts file {path} holds no prompt")
    return requests


def _parse_object(line: str, default: VideoRequest) -> VideoRequest:
    given = parse_json(line, "it")
    if not isinstance(given, dict) or "prompt" not in given:
        raise ValueError('expected an object such as {"prompt": "a rabbit", "seed": 1}')
    kinds = {**_REQUEST_KINDS, **_SETTINGS_KINDS}
    for name, value in given.items():
        if name == _LORA_SCALE:
            continue
        if name not in kinds:
            raise ValueError(f"there is no setting {name!r}; expected some of {', '.join([*kinds, _LORA_SCALE])}")
        if not _is_kind(value, kinds[name]):
            raise ValueError(f"{name} is {value!r:.60}; expected {kinds[name].__name__}")
    if given.get("solver", SOLVERS[0]) not in SOLVERS:
        raise ValueError(f"there is no solver {given['solver']!r:.60}; expected {', '.join(SOLVERS)}")
    changes: dict[str, Any] = {name: given[name] for name in ("prompt", "frames", "seed") if name in given}
    if "size" in given:
        changes["width"], changes["height"] = parse_size(given["size"])
    if _LORA_SCALE in given:
        changes["lora_scales"] = _parse_scales(given[_LORA_SCALE], default)
    own: dict[str, Any] = {name: kind(given[name]) for name, kind in _SETTINGS_KINDS.items() if name in given}
    return dataclasses.replace(default, **changes, settings=dataclasses.replace(default.settings, **own))


def _parse_scales(value: object, default: VideoRequest) -> tuple[float, ...]:
    several: list[Any] = value if isinstance(value, list) else [value]
    if not all(_is_kind(one, float) for one in several):
        raise ValueError(f"{_LORA_SCALE} is {value!r:.60}; expected a number, or a list of them")
    if default.lora_scales is None:
        raise ValueError(f"{_LORA_SCALE} needs LoRA files that are not merged: give --lora and --lora-mode unmerged")
    return scales_of([float(one) for one in several], len(default.lora_scales))


def _is_kind(value: object, kind: type) -> bool:
    if isinstance(value, bool) or (isinstance(value, int) and abs(value) > _LARGEST):
        return False
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)
