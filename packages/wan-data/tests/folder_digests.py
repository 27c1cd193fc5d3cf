"""Digests of the files of a folder."""

from pathlib import Path

from wan_model.system.files import sha256_of


def digests(folder: Path) -> dict[str, str]:
    """Of every file, by its relative path."""
    return {
        path.relative_to(folder).as_posix(): sha256_of(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def without_index(folder: Path) -> dict[str, str]:
    """``digests`` without Energon's database, whose bytes depend on the version of the SQLite library."""
    return {name: digest for name, digest in digests(folder).items() if not name.endswith(".sqlite")}
