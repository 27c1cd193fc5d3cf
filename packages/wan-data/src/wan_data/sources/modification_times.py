"""The modification times of a dataset's sources, from which ``wan-data prepare`` sees which of them to read again.

They stand beside the manifest and not in it, because they differ between copies of the same files. Without them, or
where a time differs, the digest of a file is compared.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from wan_model.system.files import write_bytes
from wan_model.system.safe_reading import read_json

TIMES_NAME = "source-times.json"
# Bytes; a source has its name and some thirty more.
_LARGEST = 4 << 30


def read_times(folder: Path) -> dict[str, int]:
    """Modification time of each source in ns, by its name; empty if the file is missing or damaged."""
    try:
        value = read_json(folder / TIMES_NAME, _LARGEST)
    except (OSError, ValueError):
        return {}
    if not isinstance(value, dict):
        return {}
    return {name: time for name, time in value.items() if isinstance(time, int)}


def write_times(folder: Path, times: Mapping[str, int]) -> None:
    """Write the times, if they are not in the folder already, and nothing else has their name."""
    path = folder / TIMES_NAME
    if read_times(folder) != times and (path.is_file() or not os.path.lexists(path)):
        write_bytes(path, json.dumps(times, sort_keys=True, indent=0, ensure_ascii=False).encode())
