"""Regular expressions of peft's ``rank_pattern`` and ``alpha_pattern``, matched within a bounded time.

Source: peft's ``get_pattern_key``.
"""

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from wan_model.weights.lora_keys import shown

# Without groups and repetitions the time of a match is bounded by the length of pattern and name.
_PLAIN = re.compile(r"(?:[\w.^$|-]|\\\.|\[\^?(?:\w(?:-\w)?)+\])*")
# Answers {"found": [index or null, ...]} or {"invalid": index}.
_PROGRAM = r"""
import json, re, sys
try:
    import resource
    for kind, limit in ((resource.RLIMIT_CPU, int(sys.argv[1])), (resource.RLIMIT_AS, 2**30)):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard),) * 2)
except ImportError:
    pass
patterns, names = json.load(sys.stdin)
compiled = []
for i, pattern in enumerate(patterns):
    try:
        compiled.append(re.compile(rf"(.*\.)?({pattern})$"))
    except (re.error, RecursionError, OverflowError):
        print(json.dumps({"invalid": i}))
        sys.exit()
found = [next((i for i, one in enumerate(compiled) if one.match(name)), None) for name in names]
print(json.dumps({"found": found}))
"""


def match_patterns(
    patterns: Sequence[str], names: Sequence[str], where: str, *, cpu_seconds: int = 5
) -> list[int | None]:
    """The index of the first pattern that matches each name, or the end of it from a dot on; None where none does.

    A regular expression can take exponential time. Any but plain ones are therefore matched in a process of their own
    with a limit of its CPU time.

    Raises:
        ValueError: a pattern is no regular expression, or matching takes too long.
    """
    if all(_PLAIN.fullmatch(pattern) for pattern in patterns):
        compiled = [_compiled(pattern, where) for pattern in patterns]
        return [next((i for i, one in enumerate(compiled) if one.match(name)), None) for name in names]
    # Isolated and without site: nothing of the working folder or of installed packages is imported.
    command = [sys.executable, "-I", "-S", "-c", _PROGRAM, str(cpu_seconds)]
    try:
        done = subprocess.run(
            command, input=json.dumps([patterns, names]), capture_output=True, text=True, timeout=60, check=True
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"{where} has regular expressions that take too long to match; write simpler ones") from error
    answer = json.loads(done.stdout)
    if "invalid" in answer:
        raise _invalid(patterns[answer["invalid"]], where)
    found: list[int | None] = answer["found"]
    return found


def _compiled(pattern: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise _invalid(pattern, where) from error


def _invalid(pattern: str, where: str) -> ValueError:
    return ValueError(f"{where} has the pattern {shown(pattern)!r}, which is no regular expression of Python")
