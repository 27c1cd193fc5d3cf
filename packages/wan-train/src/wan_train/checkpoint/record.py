"""``complete.json``, which marks a checkpoint as complete: written last, with the size and SHA-256 of every file.

Needs neither Megatron nor torch.
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from wan_model.system.files import write_json
from wan_model.system.safe_reading import read_json, require_file

RECORD_NAME = "complete.json"
_FORMAT = 1
_BLOCK = 1 << 22
# Some hundred bytes for each file, and some files for each of thousands of ranks.
_LARGEST = 1 << 26


class PartialCheckpointError(ValueError):
    """The checkpoint was never completed."""


class DamagedCheckpointError(ValueError):
    """The checkpoint was complete, and has been changed or damaged since."""


@dataclasses.dataclass(frozen=True)
class FileRecord:
    """Size and digest of a file of a complete checkpoint.

    Attributes:
        bytes: size.
        sha256: hexadecimal digest.
    """

    bytes: int
    sha256: str


def record_file(path: Path) -> FileRecord:
    """Size and digest of a file, which is flushed to the disk."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
        os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())


def write_record(folder: Path, step: int, files: Mapping[str, FileRecord]) -> None:
    """Mark a checkpoint as complete, atomically."""
    content = {
        "format": _FORMAT,
        "step": step,
        "files": {name: dataclasses.asdict(record) for name, record in sorted(files.items())},
    }
    write_json(folder / RECORD_NAME, content)


def read_record(folder: Path, step: int) -> dict[str, FileRecord]:
    """The files of a complete checkpoint; each exists with the recorded size.

    Raises:
        PartialCheckpointError: it was never completed.
        DamagedCheckpointError: a file is missing or has another size; the message names it.
        ValueError: the system refuses to read it, which says nothing about its content.
    """
    path = folder / RECORD_NAME
    try:
        content = read_json(path, _LARGEST)
    except FileNotFoundError:
        raise PartialCheckpointError(f"{path} is missing: the checkpoint was never completed") from None
    except ValueError as error:
        raise _damage_or_refusal(error) from error
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
            size = require_file(folder / name)
        except FileNotFoundError:
            raise DamagedCheckpointError(f"{folder / name} is missing, which {RECORD_NAME} names") from None
        except ValueError as error:
            raise _damage_or_refusal(error) from error
        if size != record.bytes:
            raise DamagedCheckpointError(f"{folder / name} has {size} bytes where {RECORD_NAME} says {record.bytes}")
    return files


def _damage_or_refusal(error: ValueError) -> ValueError:
    """Advice to delete a checkpoint belongs to damage only, not to permissions or a disk that is not mounted."""
    return ValueError(str(error)) if isinstance(error.__cause__, OSError) else DamagedCheckpointError(str(error))


def changed_files(folder: Path, files: Mapping[str, FileRecord], names: Iterable[str]) -> list[str]:
    """Those of the named files whose digest differs from the record."""
    return [name for name in names if record_file(folder / name) != files[name]]
