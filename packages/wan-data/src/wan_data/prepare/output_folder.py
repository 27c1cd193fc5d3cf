"""The output folder of a preparation: locked, not of another program, cleared only when asked."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from wan_data.index.manifest import MANIFEST_NAME, read_manifest
from wan_data.index.records import PART_GLOB
from wan_data.prepare.earlier_index import EARLIER_NAME, keep_index
from wan_data.prepare.ranks import Ranks
from wan_data.reading.empty_caption import EMPTY_CAPTION_NAME
from wan_data.shards.energon_metadata import META_FOLDER
from wan_data.shards.lock import LOCK_NAME, writer_lock
from wan_data.sources.modification_times import EARLIER_TIMES_NAME, TIMES_NAME
from wan_model.system.files import PARTIAL_SUFFIX, sync_folder

# The state of an unfinished preparation: the next run resumes from it, the end of a run removes it.
WORK_FOLDER = ".wan-data"
# What each rank has found of sources.
CACHE_GLOB = "*-examined.sqlite"


@contextlib.contextmanager
def output_folder(folder: Path, ranks: Ranks, *, overwrite: bool) -> Iterator[None]:
    """Lock the output folder for this preparation; with ``overwrite`` the files of earlier runs are removed.

    Raises:
        ValueError: the folder holds files of another program, or another process is writing it.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; expected a folder to write to")
    # The partial manifest is left by a run that was killed while it wrote its first one.
    allowed = (LOCK_NAME, WORK_FOLDER, MANIFEST_NAME + PARTIAL_SUFFIX)
    foreign = folder.is_dir() and any(path.name not in allowed for path in folder.iterdir())
    # Looked for last: another process may just have written it, and after it other files, and holds the lock.
    if foreign and not (folder / MANIFEST_NAME).is_file():
        raise ValueError(f"{folder} holds files that wan-data did not write; choose an empty or a new folder")
    if ranks.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)
    with writer_lock(folder) if ranks.rank == 0 else contextlib.nullcontext():
        if ranks.rank == 0 and overwrite:
            clear(folder, keep_known=True)
        ranks.barrier("folder")
        yield


def clear(folder: Path, *, keep_known: bool) -> None:
    """Remove the files that a preparation writes, and no others.

    Args:
        folder: the output folder.
        keep_known: keep what is known of the sources, in the folder of an unfinished preparation, for the next run.
    """
    work, kept = folder / WORK_FOLDER, tuple[str, ...]()
    if keep_known:
        with contextlib.suppress(OSError, ValueError):  # of a damaged dataset nothing is known
            kept = keep_index(folder, work, read_manifest(folder, allow_incomplete=True))
        # Without another index, one that an interrupted run has kept stays.
        patterns = (CACHE_GLOB, *(kept or (EARLIER_NAME, PART_GLOB)))
        for path in work.glob("*"):
            if not any(path.match(pattern) for pattern in patterns):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    else:
        shutil.rmtree(work, ignore_errors=True)
    # The manifest goes last: it marks the folder as ours if this is interrupted.
    shutil.rmtree(folder / META_FOLDER, ignore_errors=True)
    ours = ("shard-rank*.tar", "shard-rank*.tar.idx", f"*{PARTIAL_SUFFIX}", EMPTY_CAPTION_NAME, f"{TIMES_NAME}*")
    for pattern in (*ours, PART_GLOB, EARLIER_TIMES_NAME):
        for path in folder.glob(pattern):
            path.unlink()
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
