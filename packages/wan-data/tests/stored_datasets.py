"""Clips and datasets in a bucket, prepared by the command."""

import json
import shutil
from pathlib import Path
from typing import Any

from data_command import run
from folder_digests import without_index

SMALL_OPTIONS = (
    *("--area", 32 * 48, "--frames", 9, "--min-frames", 5, "--samples-per-shard", 3),
    *("--validation-fraction", 1e-4, "--device", "cpu", "--num-decoders", 1),
)


def upload_folder(source: Path, bucket_folder: Path, name: str = "clips") -> Path:
    """Copy a folder into that of a bucket, which is the same as uploading it."""
    return Path(shutil.copytree(source, bucket_folder / name))


def prepare_stored(model: Path, *options: object):
    """``wan-data prepare`` at the small settings."""
    return run("prepare", "--model", model, *SMALL_OPTIONS, *options)


def content_of(folder: Path) -> dict[str, Any]:
    """A dataset without what follows from the times of its sources; its databases depend on the SQLite library."""
    manifest = json.loads((folder / "wan-data.json").read_bytes())
    for part in manifest["index"]["parts"]:
        del part["digest"]
    files = {name: digest for name, digest in without_index(folder).items() if not name.startswith(".wan-data")}
    return {**files, "wan-data.json": manifest}
