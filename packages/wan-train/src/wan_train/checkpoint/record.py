"""What says that a checkpoint is complete: ``complete.json``, written last, with the size and digest of every file.

No Megatron and no torch is needed to read or check it.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from wan_model.system.files import write_json

RECORD_NAME = "complete.json"
_FORMAT = 1
_BLOCK = 1 << 22


class PartialCheckpointError(ValueError):
    """A checkpoint that was never completed."""


class DamagedCheckpointError(ValueError):
    """A checkpoint that was complete once and is not any more."""


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """A file as it was when the checkpoint was completed.

    Attributes:
        bytes: its size.
        sha256: its digest, in hexadecimal.
    """

    bytes: int
    sha256: str


def record_file(path: Path) -> FileRecord:
    """Read a file to its end, and see to it that it is on the disk."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
        os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())


def write_record(folder: Path, step: int, files: Mapping[str, FileRecord]) -> None:
    """Declare a checkpoint complete, at once or not at all."""
    content = {
        "format": _FORMAT,
        "step": step,
        "files": {name: dataclasses.asdict(record) for name, record in sorted(files.items())},
    }
    write_json(folder / RECORD_NAME, content)


def read_record(folder: Path, step: int) -> dict[str, FileRecord]:
    """The files of a complete checkpoint; each of them is there with its size.

    Raises:
        PartialCheckpointError: it was never completed.
        DamagedCheckpointError: it was, and something of it has gone or changed its size, which is named.
    """
    path = folder / RECORD_NAME
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise PartialCheckpointError(f"{path} is missing: the checkpoint was never completed") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {error}") from error
    try:
        if content["format"] != _FORMAT or content["step"] != step:
            raise DamagedCheckpointError(
                f"{path} is of format {content['format']}, step {content['step']}; expected 1, {step}"
            )
        files = {str(name): FileRecord(int(one["bytes"]), str(one["sha256"])) for name, one in content["files"].items()}
    except (TypeError, KeyError, AttributeError) as error:
        raise DamagedCheckpointError(f"{path} is not the record of a checkpoint: {error!r}") from error
    for name, record in files.items():
        if Path(name).name != name:
            raise DamagedCheckpointError(f"{path} names {name!r}, which is not a file beside it")
        try:
            size = (folder / name).stat().st_size
        except OSError:
            raise DamagedCheckpointError(f"{folder / name} is missing, which {RECORD_NAME} names") from None
        if size != record.bytes:
            raise DamagedCheckpointError(f"{folder / name} has {size} bytes where {RECORD_NAME} says {record.bytes}")
    return files


def changed_files(folder: Path, files: Mapping[str, FileRecord], names: Iterable[str]) -> list[str]:
    """Those of the named files whose content is not what it was."""
    return [name for name in names if record_file(folder / name) != files[name]]
