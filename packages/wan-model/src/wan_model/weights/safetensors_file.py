"""Writing safetensors files with the permissions and errors of any other file."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

_CODE = re.compile(r"\(os error (\d+)\)")


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write contiguous CPU tensors by name over an existing file, such as that of ``atomic_path``.

    safetensors (0.8) writes a file beside it that only its owner may read, and renames that.

    Raises:
        OSError: it cannot be written; the error names the file.
    """
    permissions = path.stat().st_mode & 0o7777
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        if code := _CODE.search(str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        raise
    path.chmod(permissions)
