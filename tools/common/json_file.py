"""Files of JSON that the tools write."""

import json
from pathlib import Path
from typing import Any

from wan_model.system.files import write_bytes


def write_json(path: Path, value: Any) -> None:
    """Write a file atomically, with the keys in their order, so that a stopped tool leaves none half written.

    Raises:
        OSError: it cannot be written; the error names the path.
    """
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
