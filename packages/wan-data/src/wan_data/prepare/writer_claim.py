"""Which preparation writes a dataset in a store: an object with its token, because nothing in a store can be locked.

Shards of the next numbers have the same names whichever preparation writes them, and sizes that are often equal. The
object stays from the first object that a preparation writes until its manifest stands, also after a kill. Who begins
to write replaces it, and the preparation that it was of is told before it writes more.
"""

import contextlib

from wan_data.storage.location import StorePath
from wan_data.storage.store import delete, read, write

CLAIM_NAME = "wan-data.writer"
_LONGEST = 100  # bytes that are read of it


class WriterClaim:
    """The claim of one preparation, whose ranks share it.

    Args:
        folder: of the dataset.
        token: of the preparation, which an interrupted one keeps.
        before: the claim that it found when it began; None if there was none.
    """

    def __init__(self, folder: StorePath, token: str, before: str | None) -> None:
        self._path, self._token, self._before = folder / CLAIM_NAME, token, before

    def hold(self) -> bool:
        """Claim the dataset, unless it is.

        Returns:
            Whether it is claimed now; False if another preparation has claimed it since this one began.

        Raises:
            OSError: the store fails.
        """
        now = claimed_by(self._path.parent)
        if now == self._token:
            return True
        # Without a claim another may have come and gone: then the manifest is another.
        if now is not None and now != self._before:
            return False
        write(self._path, self._token.encode())
        return True

    def release(self) -> None:
        """Remove the claim; where nothing may be deleted it stays, and the next preparation replaces it."""
        if claimed_by(self._path.parent) == self._token:
            with contextlib.suppress(PermissionError):
                delete([self._path])


def claimed_by(folder: StorePath) -> str | None:
    """The token of the preparation that writes a dataset, or was interrupted while it did; None if there is none.

    Raises:
        OSError: the store fails.
    """
    try:
        return read(folder / CLAIM_NAME, 0, _LONGEST).decode("ascii", "replace")
    except FileNotFoundError:
        return None
